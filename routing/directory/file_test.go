package directory

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/posthouse/posthouse/routing"
)

func put(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

func newFile(t testing.TB, text string) *File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "users.map")
	put(t, path, text)
	f, err := NewFile(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func wantEntry(t *testing.T, f *File, name, user, role string) {
	t.Helper()
	entry, err := f.Lookup(t.Context(), name)
	if user == "" {
		if !errors.Is(err, routing.ErrUnknownUser) {
			t.Errorf("Lookup(%q) = %+v, %v; want certainly absent", name, entry, err)
		}
		return
	}
	if err != nil || entry != (routing.Entry{User: user, Role: role}) {
		t.Errorf("Lookup(%q) = %+v, %v; want %s in %s", name, entry, err, user, role)
	}
}

func TestFile(t *testing.T) {
	f := newFile(t, "# comment\r\n"+
		"\n"+
		"  alice@example.org :\tma01   # Alice\n"+
		"a#b@example.org: ma02\n"+
		"sip:carol@example.org: ma02\r\n"+
		"postmaster@example.org -> alice@example.org\n"+
		"dave: ma03")
	wantEntry(t, f, "alice@example.org", "alice@example.org", "ma01")
	wantEntry(t, f, "a#b@example.org", "a#b@example.org", "ma02")
	wantEntry(t, f, "sip:carol@example.org", "sip:carol@example.org", "ma02")
	wantEntry(t, f, "dave", "dave", "ma03")
	wantEntry(t, f, "Alice@example.org", "", "")
	wantEntry(t, f, "", "", "")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := f.Lookup(ctx, "nobody"); !errors.Is(err, context.Canceled) {
		t.Errorf("an ended context: %v", err)
	}
}

// The canonical user is the only key: an alias, and a name that is written in
// another way, lead to the one user.
func TestSafety29Canonical(t *testing.T) {
	path := filepath.Join(t.TempDir(), "users.map")
	put(t, path, "Postmaster@Example.org -> Alice@Example.org\nAlice@Example.org: ma01\n")
	f, err := NewFile(path, func(s string) (string, error) { return strings.ToLower(s), nil })
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"alice@example.org", "postmaster@example.org"} {
		wantEntry(t, f, name, "alice@example.org", "ma01")
	}
	wantEntry(t, f, "Alice@Example.org", "", "") // callers normalise first
}

func TestFileBadLines(t *testing.T) {
	bad := map[string]string{
		"alice":                                 "want `user: role` or `alias -> user`",
		"alice:":                                "want `user: role` or `alias -> user`",
		": ma01":                                "want `user: role` or `alias -> user`",
		"al ice: ma01":                          "blank, comma, control character",
		"alice: ma 01":                          "blank, comma, control character",
		"alice,bob: ma01":                       "blank, comma, control character",
		"al\x00ice: ma01":                       "blank, comma, control character",
		"al\xffice: ma01":                       "broken UTF-8",
		strings.Repeat("a", lineMax) + ": ma01": "line is longer",
		"x: ma01\nx: ma02":                      "users.map:2: x stands in line 1 already",
		"x: ma01\nx: ma01":                      "users.map:2: x stands in line 1 already",
		"x: ma01\nx -> y\ny: ma01":              "users.map:2: x stands in line 1 already",
		"x -> y\ny: ma01\nx: ma01":              "users.map:3: x stands in line 1 already",
		"x -> y":                                "users.map:1: alias x leads to y, which is no user",
		"x -> y\ny -> z\nz: ma01":               "users.map:1: alias x leads to y, which is no user",
		"x -> y -> z\nz: ma01":                  "blank, comma",
		"":                                      "is empty",
	}
	for text, want := range bad {
		path := filepath.Join(t.TempDir(), "users.map")
		put(t, path, text)
		if _, err := NewFile(path, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %v, want %q", text, err, want)
		}
	}
	refused := func(string) (string, error) { return "", errors.New("not PRECIS") }
	path := filepath.Join(t.TempDir(), "users.map")
	put(t, path, "alice: ma01\n")
	if _, err := NewFile(path, refused); err == nil || !strings.Contains(err.Error(), `users.map:1: "alice": not PRECIS`) {
		t.Errorf("a name that cannot be normalised: %v", err)
	}
	if _, err := NewFile(t.TempDir(), nil); err == nil {
		t.Error("a directory was read as a file")
	}
	if _, err := NewFile(path+".missing", nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

// Every bad line is reported at once, but not a whole file of them.
func TestFileAllErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "users.map")
	put(t, path, "a -> nobody\nb\nc: ma01\nc: ma02\n")
	_, err := NewFile(path, nil)
	if err == nil {
		t.Fatal("no error")
	}
	lines := strings.Split(err.Error(), "\n")
	for i, want := range []string{":1: alias a", ":2: want", ":4: c stands in line 3"} {
		if len(lines) != 3 || !strings.Contains(lines[i], want) {
			t.Fatalf("want line %d to have %q:\n%v", i, want, err)
		}
	}
	put(t, path, strings.Repeat("x: ma01\n", 5000))
	_, err = NewFile(path, nil)
	lines = strings.Split(err.Error(), "\n")
	if len(lines) != errorsMax+1 || !strings.HasSuffix(lines[errorsMax], "users.map: and 4899 more") {
		t.Errorf("%d lines, the last %q", len(lines), lines[len(lines)-1])
	}
}

// remembers is what a frontend knows of where users were last.
func remembers(roles map[string]string) func(string) (string, error) {
	return func(user string) (string, error) { return roles[user], nil }
}

// A reload that gives a user another role changes nothing, at frontends that have
// met the user and at those that have not: sessions may be anywhere. Who is new
// may have any role; who comes back, the one in which they were last.
func TestSafety26Reload(t *testing.T) {
	const before = "a: ma01\nb: ma01\nc: ma02\nx -> a\n"
	known := map[string]string{"a": "ma01", "gone": "ma01", "c": "ma03"}
	for name, c := range map[string]struct{ after, refused string }{
		"users come and go":        {"a: ma01\nd: ma02\ny -> d\n", ""},
		"back to where it was":     {"a: ma01\nc: ma03\n", ""},
		"an old user comes back":   {before + "gone: ma01\n", ""},
		"moved, and known":         {"a: ma02\nb: ma01\nnew: ma01\n", "1 users have another role, and may be inside the old one still, which would put them on two backends: a (ma02, was in ma01):"},
		"moved, and not known":     {"a: ma01\nb: ma02\n", "b (ma02, was in ma01)"},
		"taken away, and back":     {before + "gone: ma02\n", "gone (ma02, was in ma01)"},
		"both of two, one unknown": {"b: ma04\na: ma05\n", "2 users have another role, and may be inside the old one still, which would put them on two backends: a (ma05, was in ma01), b (ma04, was in ma01):"},
		"a bad line":               {before + "d\n", "users.map:5: want"},
		"an alias that was a user": {"a: ma01\nb -> a\n", ""},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFile(t, before)
			put(t, f.Path(), c.after)
			err := Reload([]*File{f}, remembers(known))
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Errorf("Reload = %v, want %q", err, c.refused)
				}
				wantEntry(t, f, "b", "b", "ma01")
				wantEntry(t, f, "x", "a", "ma01")
				wantEntry(t, f, "new", "", "")
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			wantEntry(t, f, "a", "a", "ma01")
			if !strings.Contains(c.after, "x ->") {
				wantEntry(t, f, "x", "", "")
			}
		})
	}
	f := newFile(t, before)
	put(t, f.Path(), before+"d: ma01\n")
	broken := errors.New("disk")
	if err := Reload([]*File{f}, func(string) (string, error) { return "", broken }); !errors.Is(err, broken) {
		t.Errorf("could not tell: %v", err)
	}
	if err := os.Remove(f.Path()); err != nil {
		t.Fatal(err)
	}
	if err := Reload([]*File{f}, remembers(nil)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
	wantEntry(t, f, "d", "", "")
}

// Several files are one directory: who goes from one to another stays where they
// are, or the reload is refused, and none of the files is taken then.
func TestSafety26ReloadOfAChain(t *testing.T) {
	one, two := newFile(t, "a: ma01\n"), newFile(t, "a: ma02\nb: ma02\n")
	put(t, one.Path(), "b: ma02\na: ma01\n")
	put(t, two.Path(), "c: ma02\n")
	if err := Reload([]*File{one, two}, remembers(nil)); err != nil {
		t.Fatal(err)
	}
	put(t, one.Path(), "a: ma01\n")
	put(t, two.Path(), "b: ma01\nc: ma02\nd: ma01\n")
	if err := Reload([]*File{one, two}, remembers(nil)); err == nil || !strings.Contains(err.Error(), "b (ma01, was in ma02)") {
		t.Errorf("from one file to the other, into another role: %v", err)
	}
	wantEntry(t, one, "b", "b", "ma02")
	wantEntry(t, two, "d", "", "")
}

func TestReloadNamesAFewUsers(t *testing.T) {
	file := func(role string) string {
		var text strings.Builder
		for i := range 1000 {
			fmt.Fprintf(&text, "user%04d: %s\n", i, role)
		}
		return text.String()
	}
	f := newFile(t, file("ma01"))
	put(t, f.Path(), file("ma02"))
	err := Reload([]*File{f}, remembers(nil))
	if err == nil || !strings.Contains(err.Error(), "user0004 (ma02, was in ma01), and 995 more:") || strings.Contains(err.Error(), "user0005") {
		t.Errorf("Reload = %v", err)
	}
}

// Lookups during reloads see one file or the other.
func TestLookupDuringReload(t *testing.T) {
	f := newFile(t, "a: ma01\nx -> a\n")
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range 50 {
			put(t, f.Path(), "a: ma01\nx -> a\n"+[]string{"", "b: ma01\n"}[i%2])
			if err := Reload([]*File{f}, remembers(nil)); err != nil {
				t.Error(err)
			}
		}
	}()
	for {
		if entry, err := f.Lookup(t.Context(), "x"); err != nil || entry.User != "a" {
			t.Fatalf("%+v, %v", entry, err)
		}
		select {
		case <-done:
			return
		default:
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add("alice: ma01\nx -> alice # c\n")
	f.Add("a\nb:\n -> \nx -> y\nx: :\n")
	f.Fuzz(func(t *testing.T, text string) {
		u, err := parse("f", text, func(s string) (string, error) { return s, nil })
		if err != nil {
			return
		}
		for name := range u.alias {
			if _, err := u.lookup(name); err != nil {
				t.Fatalf("alias %q leads nowhere", name)
			}
		}
		for name, role := range u.role {
			entry, err := u.lookup(name)
			if err != nil || entry.User != name || int(role) >= len(u.roles) || entry.Role == "" {
				t.Fatalf("%q: %+v, %v", name, entry, err)
			}
		}
	})
}

// BenchmarkLoad457k is the site that posthouse was made for.
func BenchmarkLoad457k(b *testing.B) {
	var text strings.Builder
	for i := range 457_000 {
		fmt.Fprintf(&text, "user%d@example.org: ma%02d\n", i, i%40)
	}
	f := newFile(b, text.String())
	text.Reset()
	for b.Loop() {
		if err := Reload([]*File{f}, remembers(nil)); err != nil {
			b.Fatal(err)
		}
	}
	var with, without runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&with)
	f.now.Store(&users{})
	runtime.GC()
	runtime.ReadMemStats(&without)
	b.ReportMetric(float64(with.HeapAlloc-without.HeapAlloc)/1e6, "MB")
}

func BenchmarkLookup(b *testing.B) {
	f := newFile(b, "alice: ma01\nx -> alice\n")
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.Lookup(b.Context(), "x"); err != nil {
			b.Fatal(err)
		}
	}
}
