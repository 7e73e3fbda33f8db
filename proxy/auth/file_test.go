package auth

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
)

const users = "# the staff\n" +
	"Alice@Example.org:{PLAIN}secret\n" +
	"bob:$6$saltstring$" + helloKey + ":1000:1000::/home/bob:/bin/sh:userdb_quota=1\n" +
	"carol:{BLF-CRYPT}$2y" + star + "\n" +
	"root:{PLAIN}rootsecret\n" +
	"dave:!$6$saltstring$" + helloKey + "\n"

// openFile opens a passwd-file of the given content, with master root.
func openFile(t *testing.T, content string) (*File, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "users.passwd")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(path, FileOptions{Names: Normalizer{Lowercase: true}, Masters: []string{"Root"}})
	if err != nil {
		t.Fatal(err)
	}
	return f, path
}

func TestFileVerify(t *testing.T) {
	f, _ := openFile(t, users)
	if f.Users() != 5 {
		t.Errorf("%d users", f.Users())
	}
	for _, tt := range []struct {
		authzid, authcid, password string
		user                       string // "" is refused
		err                        error
	}{
		{"", "alice@example.org", "secret", "alice@example.org", nil},
		{"", "ALICE@example.ORG", "secret", "alice@example.org", nil},
		{"Alice@example.org", "alice@Example.org", "secret", "alice@example.org", nil},
		{"", "alice@example.org", "Secret", "", ErrCredentials},
		{"", "alice@example.org", "", "", ErrCredentials},
		{"", "alice", "secret", "", ErrCredentials},
		{"", "bob", "Hello world!", "bob", nil},
		{"", "bob", "Hello world", "", ErrCredentials},
		{"", "bob", "", "", ErrCredentials},
		{"", "carol", "U*U", "carol", nil},
		{"", "carol", "U*U" + strings.Repeat("x", 80), "", ErrCredentials},
		{"", "dave", "Hello world!", "", ErrCredentials},
		{"", "bob*root", "rootsecret", "", ErrCredentials},
		{"", "", "secret", "", ErrCredentials},
		{"bob", "root", "rootsecret", "bob", nil},
		{"Eve", "ROOT", "rootsecret", "eve", nil}, // who exists, the directory knows
		{"bob", "root", "Hello world!", "", ErrCredentials},
		{"bob", "root", "wrong", "", ErrCredentials},
		{"bob", "carol", "U*U", "", ErrNotAuthorized},
		{"bob", "carol", "wrong", "", ErrCredentials}, // the password first
		{"b*b", "root", "rootsecret", "", ErrNotAuthorized},
		{"b*b", "root", "wrong", "", ErrCredentials},
	} {
		id, err := f.Verify(t.Context(), Credentials{"PLAIN", tt.authzid, tt.authcid, tt.password})
		if id.User != tt.user || !errors.Is(err, tt.err) || tt.err == nil && err != nil {
			t.Errorf("%q %q %q: got %v, %v; want %q, %v", tt.authzid, tt.authcid, tt.password, id, err, tt.user, tt.err)
		}
		if err != nil {
			if id != (Identity{}) || errors.Is(err, ErrCredentials) == errors.Is(err, ErrNotAuthorized) {
				t.Errorf("%q %q: got %v, %v", tt.authzid, tt.authcid, id, err)
			}
			if tt.password != "" && strings.Contains(err.Error(), tt.password) && tt.password != "wrong" {
				t.Errorf("password in %v", err)
			}
			continue
		}
		c := id.Credentials
		if !id.Verified || c.Password != tt.password || c.Authcid != id.Authcid || c.Authzid != "" && c.Authzid != id.User || c.Authzid == id.Authcid {
			t.Errorf("%q %q: kept %q, %q for replay", tt.authzid, tt.authcid, c.Authzid, c.Authcid)
		}
	}
}

// TestReload: a bad file changes nothing and every fault of it is named.
func TestReload(t *testing.T) {
	f, path := openFile(t, users)
	verify := func(user, password string) error {
		_, err := f.Verify(t.Context(), Credentials{"PLAIN", "", user, password})
		return err
	}
	for _, tt := range []struct{ content, want string }{
		{"alice@example.org:{PLAIN}changed\nbob\n\nbob:{PLAIN}\nroot:{PLAIN}x\nROOT:{PLAIN}y\n",
			"PATH:2: has no colon; write user:{SCHEME}hash\n" +
				"PATH:4: empty password; write one, or put ! there to lock the account\n" +
				"PATH:6: the same user as in line 5; delete one of them"},
		{"# nobody\n", "PATH:1: no users; write one line user:{SCHEME}hash for each"},
		{"", "PATH:1: no users; write one line user:{SCHEME}hash for each"},
	} {
		if err := os.WriteFile(path, []byte(tt.content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := f.Reload(); err == nil || strings.ReplaceAll(err.Error(), path, "PATH") != tt.want {
			t.Errorf("got %v, want %s", err, tt.want)
		}
		if err := verify("alice@example.org", "secret"); err != nil {
			t.Errorf("after a bad file: %v", err)
		}
	}
	if err := os.WriteFile(path, []byte("alice@example.org:{PLAIN}changed\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.Reload(); err != nil {
		t.Fatal(err)
	}
	if err := verify("alice@example.org", "changed"); err != nil {
		t.Errorf("the new password: %v", err)
	}
	for _, user := range []string{"alice@example.org", "bob"} {
		if err := verify(user, "secret"); !errors.Is(err, ErrCredentials) {
			t.Errorf("%s: got %v", user, err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := f.Reload(); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	if err := verify("alice@example.org", "changed"); err != nil {
		t.Errorf("after the file is gone: %v", err)
	}
}

func TestOpenFileReportsAll(t *testing.T) {
	_, err := OpenFile("testdata/absent", FileOptions{Masters: []string{"a b", "c*d"}})
	if err == nil || strings.Count(err.Error(), "\n") != 2 || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// TestHashingIsBounded: with all slots taken, known and unknown users wait
// alike, and whoever stops waiting could not be told anything. It catches: no
// dummy hash for unknown users, no bound, a wait that ignores the context, and
// a timeout that looks like a wrong password.
func TestHashingIsBounded(t *testing.T) {
	f, _ := openFile(t, users)
	synctest.Test(t, func(t *testing.T) {
		f.hashing = make(chan struct{}, 1)
		f.hashing <- struct{}{}
		for _, user := range []string{"bob", "nobody", "dave"} {
			ctx, cancel := context.WithCancel(t.Context())
			var err error
			var wg sync.WaitGroup
			wg.Go(func() { _, err = f.Verify(ctx, Credentials{"PLAIN", "", user, "Hello world!"}) })
			synctest.Wait()
			if err != nil {
				t.Errorf("%s did not wait: %v", user, err)
			}
			cancel()
			wg.Wait()
			if !errors.Is(err, context.Canceled) || errors.Is(err, ErrCredentials) {
				t.Errorf("%s: got %v", user, err)
			}
		}
		<-f.hashing
		if _, err := f.Verify(t.Context(), Credentials{"PLAIN", "", "bob", "Hello world!"}); err != nil || len(f.hashing) != 0 {
			t.Errorf("with a free slot: %v; %d slots taken", err, len(f.hashing))
		}
	})
	if again, _ := openFile(t, users); cap(again.hashing) != runtime.GOMAXPROCS(0) {
		t.Errorf("%d slots", cap(again.hashing))
	}
}

// TestVerifyWhileReloading is for the race detector.
func TestVerifyWhileReloading(t *testing.T) {
	f, _ := openFile(t, users)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 100 {
				if _, err := f.Verify(t.Context(), Credentials{"PLAIN", "", "root", "rootsecret"}); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for range 50 {
			if err := f.Reload(); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
}

func TestBackend(t *testing.T) {
	b := &Backend{Names: Normalizer{Lowercase: true}}
	for _, tt := range []struct {
		authzid, authcid, user string
		err                    error
	}{
		{"", "Alice", "alice", nil},
		{"ALICE", "alice", "alice", nil},
		{"bob", "alice", "", ErrNotAuthorized},
		{"b*b", "alice", "", ErrNotAuthorized},
		{"", "alice*root", "", ErrCredentials},
	} {
		id, err := b.Verify(t.Context(), Credentials{"PLAIN", tt.authzid, tt.authcid, "p"})
		if id.User != tt.user || id.Verified || !errors.Is(err, tt.err) || tt.err == nil && (err != nil || id.Credentials != (Credentials{"PLAIN", "", tt.user, "p"})) {
			t.Errorf("%q %q: got %v, %v", tt.authzid, tt.authcid, id, err)
		}
	}
}

// verifierFunc answers with a constant.
type verifierFunc func() (Identity, error)

func (f verifierFunc) Verify(context.Context, Credentials) (Identity, error) { return f() }

func TestChain(t *testing.T) {
	yes := verifierFunc(func() (Identity, error) { return Identity{User: "alice", Verified: true}, nil })
	other := verifierFunc(func() (Identity, error) { return Identity{User: "other"}, nil })
	wrong := verifierFunc(func() (Identity, error) { return Identity{}, &NameError{"test"} })
	refused := verifierFunc(func() (Identity, error) { return Identity{}, ErrNotAuthorized })
	errDown := errors.New("the source is down")
	down := verifierFunc(func() (Identity, error) { return Identity{}, errDown })
	for i, tt := range []struct {
		chain Chain
		user  string
		err   error
	}{
		{Chain{yes, other}, "alice", nil},
		{Chain{wrong, yes}, "alice", nil},
		{Chain{down, yes}, "alice", nil},
		{Chain{wrong, wrong}, "", ErrCredentials},
		{Chain{down, wrong}, "", errDown},
		{Chain{wrong, down}, "", errDown},
		{Chain{refused, yes}, "", ErrNotAuthorized},
		{Chain{down, refused}, "", ErrNotAuthorized},
	} {
		id, err := tt.chain.Verify(t.Context(), Credentials{})
		if id.User != tt.user || !errors.Is(err, tt.err) || tt.err == errDown && errors.Is(err, ErrCredentials) {
			t.Errorf("%d: got %v, %v", i, id, err)
		}
	}
	if _, err := (Chain{}).Verify(t.Context(), Credentials{}); err == nil || errors.Is(err, ErrCredentials) {
		t.Errorf("empty chain: %v", err)
	}
}
