package auth

import (
	"errors"
	"strings"
	"sync"
	"testing"
)

// TestNormalize holds safety case 29, as far as it is about spelling: two
// names for one mailbox are one name, or one of them is refused.
func TestNormalize(t *testing.T) {
	lower, preserve := Normalizer{Lowercase: true}, Normalizer{}
	for _, tt := range []struct {
		n        Normalizer
		in, want string // want "" is refused
	}{
		{lower, "alice", "alice"},
		{lower, "Alice@Example.ORG", "alice@example.org"},
		{preserve, "Alice@Example.ORG", "Alice@example.org"},
		{preserve, "Alice", "Alice"},
		{lower, "JÖRG", "jörg"},
		{lower, "jo\u0308rg", "j\u00f6rg"}, // NFC
		{lower, "ａｌｉｃｅ", "alice"},          // full width
		{lower, "a.b-c_d=e@x", "a.b-c_d=e@x"},
		{lower, strings.Repeat("x", MaxName), strings.Repeat("x", MaxName)},
		{lower, strings.Repeat("x", MaxName+1), ""},
		{lower, "", ""},
		{lower, "al ice", ""},
		{lower, " alice", ""},
		{lower, "alice\t", ""},
		{lower, "alice\u00a0", ""},
		{lower, "alice\x00", ""},
		{lower, "alice\r\n", ""},
		{lower, "alice\x7f", ""},
		{lower, "alice\u0085", ""},
		{lower, "ali\xffce", ""},
		{lower, `"alice"`, ""},
		{lower, "o'brien", ""},
		{lower, "a:b", ""},
		{lower, "alice%example.org", ""},
		{lower, "alice％example.org", ""}, // full width %, mapped to ASCII
		{lower, "bob*root", ""},
		{lower, "alice+work", ""},
		{lower, "example.org!alice", ""},
		{lower, "example.org/alice", ""},
		{lower, `EXAMPLE\alice`, ""},
		{Normalizer{Lowercase: true, Allow: "+"}, "Alice+Work@Example.org", "alice+work@example.org"},
		{Normalizer{Allow: "+"}, "alice%x", ""},
		{lower, "alice@", ""},
		{lower, "@example.org", ""},
		{lower, "a@b@c", ""},
		{lower, "alice@example.org.", ""},
		{lower, "alice@.example.org", ""},
		{lower, "alice@example..org", ""},
		{preserve, "a＠b@c", ""},        // a second @ by width mapping
		{lower, "ali\u200bce", ""},     // zero width space
		{lower, "\u05d0alice", ""},     // mixed direction
		{lower, "alice\U0001f600", ""}, // emoji: no identifier
	} {
		got, err := tt.n.Normalize(tt.in)
		if got != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%+v %q: got %q, %v; want %q", tt.n, tt.in, got, err, tt.want)
		}
		var why *NameError
		if err != nil && (!errors.As(err, &why) || !errors.Is(err, ErrCredentials) || why.Reason == "") {
			t.Errorf("%q: error %v gives no reason or is no ErrCredentials", tt.in, err)
		}
	}
}

func TestNormalizeConcurrently(t *testing.T) {
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range 200 {
				if got, err := (Normalizer{Lowercase: true}).Normalize("JÖRG@Example.ORG"); err != nil || got != "jörg@example.org" {
					t.Errorf("got %q, %v", got, err)
				}
			}
		})
	}
	wg.Wait()
}

// FuzzNormalize: a canonical name is canonical.
func FuzzNormalize(f *testing.F) {
	for _, name := range []string{"Alice@Example.ORG", "JÖRG", "a％b", "ß", "ẞ@İ", "a＠b"} {
		f.Add(name, true)
		f.Add(name, false)
	}
	f.Fuzz(func(t *testing.T, name string, lowercase bool) {
		n := Normalizer{Lowercase: lowercase}
		once, err := n.Normalize(name)
		if err != nil {
			if once != "" && !errors.Is(err, ErrCredentials) {
				t.Errorf("%q: %q, %v", name, once, err)
			}
			return
		}
		if twice, err := n.Normalize(once); err != nil || twice != once {
			t.Errorf("%q became %q, and that %q, %v", name, once, twice, err)
		}
		if once == "" || len(once) > MaxName || strings.ContainsAny(once, Separators+"\x00\r\n \"':") || strings.Count(once, "@") > 1 {
			t.Errorf("%q became %q", name, once)
		}
	})
}
