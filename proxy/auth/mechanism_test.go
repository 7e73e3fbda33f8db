package auth

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"
)

// TestExchange plays whole exchanges. nil is no initial response.
func TestExchange(t *testing.T) {
	long := strings.Repeat("x", MaxMessage+1)
	message := func(s string) []byte { return []byte(s) }
	for _, tt := range []struct {
		name       string
		mechanism  string
		responses  [][]byte
		challenges []string // before the last response
		want       Credentials
		malformed  bool
	}{
		{"initial response", "PLAIN", [][]byte{message("\x00alice\x00pass word ")}, nil, Credentials{"PLAIN", "", "alice", "pass word "}, false},
		{"lower case", "plain", [][]byte{nil, message("\x00alice\x00p")}, []string{""}, Credentials{"PLAIN", "", "alice", "p"}, false},
		{"authzid", "PLAIN", [][]byte{message("bob\x00root\x00pässword")}, nil, Credentials{"PLAIN", "bob", "root", "pässword"}, false},
		{"one NUL", "PLAIN", [][]byte{message("alice\x00p")}, nil, Credentials{}, true},
		{"three NULs", "PLAIN", [][]byte{message("\x00alice\x00p\x00")}, nil, Credentials{}, true},
		{"no user", "PLAIN", [][]byte{message("bob\x00\x00p")}, nil, Credentials{}, true},
		{"no password", "PLAIN", [][]byte{message("\x00alice\x00")}, nil, Credentials{}, true},
		{"empty", "PLAIN", [][]byte{{}}, nil, Credentials{}, true},
		{"empty after challenge", "PLAIN", [][]byte{nil, {}}, []string{""}, Credentials{}, true},
		{"nil after challenge", "PLAIN", [][]byte{nil, nil}, []string{""}, Credentials{}, true},
		{"CR", "PLAIN", [][]byte{message("\x00alice\x00p\r")}, nil, Credentials{}, true},
		{"LF", "PLAIN", [][]byte{message("\x00ali\nce\x00p")}, nil, Credentials{}, true},
		{"not UTF-8", "PLAIN", [][]byte{message("\x00alice\x00\xff")}, nil, Credentials{}, true},
		{"too long", "PLAIN", [][]byte{message("\x00alice\x00" + long)}, nil, Credentials{}, true},

		{"two challenges", "LOGIN", [][]byte{nil, message("alice"), message("p w")}, []string{"Username:", "Password:"}, Credentials{"LOGIN", "", "alice", "p w"}, false},
		{"initial response", "LOGIN", [][]byte{message("alice"), message("p")}, []string{"Password:"}, Credentials{"LOGIN", "", "alice", "p"}, false},
		{"no user", "LOGIN", [][]byte{nil, {}}, []string{"Username:"}, Credentials{}, true},
		{"nil user", "LOGIN", [][]byte{nil, nil}, []string{"Username:"}, Credentials{}, true},
		{"no password", "LOGIN", [][]byte{message("alice"), nil}, []string{"Password:"}, Credentials{}, true},
		{"NUL", "LOGIN", [][]byte{message("a\x00b")}, nil, Credentials{}, true},
		{"CR", "LOGIN", [][]byte{message("alice"), message("p\rq")}, []string{"Password:"}, Credentials{}, true},
		{"too long", "LOGIN", [][]byte{message(long)}, nil, Credentials{}, true},
	} {
		t.Run(tt.mechanism+" "+tt.name, func(t *testing.T) {
			m, ok := New(tt.mechanism)
			if !ok {
				t.Fatal("no such mechanism")
			}
			last := len(tt.responses) - 1
			for i, want := range tt.challenges {
				challenge, done, err := m.Next(tt.responses[i])
				if string(challenge) != want || challenge == nil || done || err != nil {
					t.Fatalf("response %d: got %q, %t, %v; want %q", i, challenge, done, err, want)
				}
			}
			challenge, done, err := m.Next(tt.responses[last])
			if challenge != nil || done == tt.malformed || errors.Is(err, ErrMalformed) != tt.malformed {
				t.Fatalf("at the end: got %q, %t, %v", challenge, done, err)
			}
			if got := m.Credentials(); got != tt.want {
				t.Errorf("got %#v, want %#v", got, tt.want)
			}
			if err != nil && strings.Contains(err.Error(), "alice") {
				t.Errorf("what the client sent is in %v", err)
			}
			if !tt.malformed {
				if _, again, err := m.Next([]byte("\x00x\x00y")); again || !errors.Is(err, ErrMalformed) {
					t.Errorf("after the end: got %t, %v", again, err)
				}
			}
		})
	}
}

func TestNames(t *testing.T) {
	for _, name := range Names() {
		if _, ok := New(name); !ok {
			t.Errorf("%s is listed and unknown", name)
		}
	}
	for _, name := range []string{"", "PLAIN ", "CRAM-MD5", "EXTERNAL"} {
		if _, ok := New(name); ok {
			t.Errorf("%q is known", name)
		}
	}
}

// TestRedaction: whatever way somebody logs an identity, no password.
func TestRedaction(t *testing.T) {
	c := Credentials{"PLAIN", "bob", "root", "hunter2"}
	id := Identity{"bob", "root", c, true}
	s, err := parseSecret("{PLAIN}hunter2")
	if err != nil {
		t.Fatal(err)
	}
	sha, err := parseSecret("$6$saltstring$" + helloKey)
	if err != nil {
		t.Fatal(err)
	}
	values := []any{c, &c, id, &id, []any{c, id}, map[string]Credentials{"x": c}, s, &s, sha, entry{"root", sha}, snapshot{decoy: sha}}
	for _, value := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			if out := fmt.Sprintf(verb, value); strings.Contains(out, "hunter2") || strings.Contains(out, "68756e74657232") || strings.Contains(out, helloKey) {
				t.Errorf("%s of %T: %s", verb, value, out)
			}
		}
	}
	for _, value := range []any{c, &c, id, map[string]any{"id": id}} {
		if out, err := json.Marshal(value); err != nil || strings.Contains(string(out), "hunter2") {
			t.Errorf("JSON of %T: %s, %v", value, out, err)
		}
	}
	if got, want := fmt.Sprint(c), `PLAIN authzid="bob" authcid="root" password=[redacted]`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := fmt.Sprint(id), `user="bob" authcid="root" verified=true`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// FuzzPlain and FuzzLogin: what is collected could be sent on by any protocol.
func FuzzPlain(f *testing.F) {
	f.Add([]byte("\x00alice\x00secret"))
	f.Add([]byte("bob\x00alice\x00secret\x00"))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, message []byte) {
		if message == nil {
			return
		}
		m, _ := New("PLAIN")
		_, done, err := m.Next(message)
		c := m.Credentials()
		checkCollected(t, c, done, err)
		if done && c.Authzid+"\x00"+c.Authcid+"\x00"+c.Password != string(message) {
			t.Errorf("%q became %q, %q, %q", message, c.Authzid, c.Authcid, c.Password)
		}
	})
}

func FuzzLogin(f *testing.F) {
	f.Add([]byte("alice"), []byte("secret"))
	f.Add([]byte(""), []byte("\r\n"))
	f.Fuzz(func(t *testing.T, user, password []byte) {
		m, _ := New("LOGIN")
		if _, _, err := m.Next(nil); err != nil {
			t.Fatal(err)
		}
		_, done, err := m.Next(user)
		if done {
			t.Fatal("done after the user name")
		}
		if err == nil {
			_, done, err = m.Next(password)
		}
		checkCollected(t, m.Credentials(), done, err)
	})
}

func checkCollected(t *testing.T, c Credentials, done bool, err error) {
	t.Helper()
	if done != (err == nil) || err != nil && !errors.Is(err, ErrMalformed) {
		t.Fatalf("done %t, error %v", done, err)
	}
	if !done {
		if c != (Credentials{}) {
			t.Fatalf("collected from a refused message: %v", c)
		}
		return
	}
	all := c.Authzid + c.Authcid + c.Password
	if c.Authcid == "" || c.Password == "" || strings.ContainsAny(all, "\x00\r\n") || !utf8.ValidString(all) || len(c.Password) > MaxMessage {
		t.Errorf("collected %q, %q, %q", c.Authzid, c.Authcid, c.Password)
	}
}
