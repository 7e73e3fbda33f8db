package auth

import (
	"fmt"
	"strings"
	"testing"
)

const (
	// helloKey is "Hello world!" with the salt "saltstring": Drepper's test vector.
	helloKey = "svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1"
	// rounds10000 is the same password with 10000 rounds.
	rounds10000 = "$6$rounds=10000$saltstringsaltst$OW1/O6BYHV6BcXZu8QVeXbDWra3Oeqh0sbHbbMCVNSnCM/UrjmM0Dp8vOuZeHBy/YTBmSK6H9qs/y3RnOaw5v."
	// star is "U*U" of crypt_blowfish's test vectors, without its version.
	star = "$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW"
)

func TestParseSecret(t *testing.T) {
	for _, tt := range []struct{ field, password string }{
		{"{PLAIN}secret ", "secret "},
		{"{plain}{x}", "{x}"},
		{"{CLEARTEXT}secret", "secret"},
		{"{SHA512-CRYPT}$6$saltstring$" + helloKey, "Hello world!"},
		{"$6$saltstring$" + helloKey, "Hello world!"},
		{"{CRYPT}" + rounds10000, "Hello world!"},
		{"{BLF-CRYPT}$2y" + star, "U*U"},
		{"{CRYPT}$2a" + star, "U*U"},
		{"$2b" + star, "U*U"},
	} {
		s, err := parseSecret(tt.field)
		if err != nil {
			t.Errorf("%s: %v", tt.field, err)
			continue
		}
		for password, want := range map[string]bool{tt.password: true, tt.password + "x": false, "": false, tt.field: false} {
			if ok, _, err := s.matches(password); ok != want || err != nil {
				t.Errorf("%s: %q matches: %t, %v", tt.field, password, ok, err)
			}
		}
	}
}

// TestParseLine has all that is wrong with a line. Among them are the bounds
// that go-crypt lacks: without them the first of these runs for minutes.
func TestParseLine(t *testing.T) {
	for _, tt := range []struct{ line, wrong string }{
		{"a:$6$rounds=999999999$saltstring$" + helloKey, "999999999 rounds"},
		{"a:$6$rounds=1000001$saltstring$" + helloKey, "1000001 rounds"},
		{"a:$6$rounds=999$saltstring$" + helloKey, "999 rounds"},
		{"a:$6$rounds=0$saltstring$" + helloKey, "broken"},
		{"a:$6$rounds=05000$saltstring$" + helloKey, "broken"},
		{"a:$6$rounds=4294967296$saltstring$" + helloKey, "4294967296 rounds"},
		{"a:$6$rounds=1000000$saltstring$" + helloKey, ""},
		{"a:$6$saltstring$" + helloKey[1:], "broken"},
		{"a:$6$$" + helloKey, "broken"},
		{"a:$6$seventeencharacte$" + helloKey, "broken"},
		{"a:$2y$31" + star[3:], "cost 31"},
		{"a:$2y$15" + star[3:], "cost 15"},
		{"a:$2y$14" + star[3:], ""},
		{"a:$2y$03" + star[3:], "cost 3"}, // go-crypt would compute cost 10
		{"a:$2y$5" + star[3:], "broken"},
		{"a:$2x" + star, "unsupported"},
		{"a:$2" + star, "unsupported"},
		{"a:$2y" + star + "x", "broken"},
		{"a:{SHA512-CRYPT}$2y" + star, "not of scheme SHA512-CRYPT"},
		{"a:{BLF-CRYPT}$6$saltstring$" + helloKey, "not of scheme BLF-CRYPT"},
		{"a:{SHA512-CRYPT}secret", "not of scheme"},
		{"a:{ARGON2ID}$argon2id$v=19$m=4294967295,t=1,p=1$c2FsdA$c2VjcmV0", "unknown scheme"},
		{"a:$argon2id$v=19$m=4294967295,t=1,p=1$c2FsdA$c2VjcmV0", "unknown kind"},
		{"a:$5$saltstring$5B8vYYiY.CVt1RlTTf8KbXBH3hsxY/GNooZaBBGWEc8", "unknown kind"},
		{"a:secret", "unknown kind"},
		{"a:{PLAIN.B64}c2VjcmV0", "unknown scheme"},
		{"a:{secret", "scheme without"},
		{"a", "no colon"},
		{"a:", "no password"},
		{"a:{CRYPT}", "no password"},
		{"a:{PLAIN}", "empty password"},
		{"a::1000:1000", "no password"},
		{":{PLAIN}secret", "empty"},
		{"a b:{PLAIN}secret", "white space"},
		{"a+b:{PLAIN}secret", "usernames.allow"},
		{"a:{PLAIN}secret:1:1::/home:/bin/sh:userdb_quota=1 nologin", "nologin"},
		{"a:{PLAIN}secret:::::: allow_nets=10.0.0.0/8", "allow_nets"},
		{"a:{PLAIN}secret::::::nopassword=y", "nopassword"},
		{"a:{PLAIN}secret::::::user=bob", "user"},
		{"a:{PLAIN}secret::::::userdb_mail=maildir:~/Maildir", ""},
		{"a:{PLAIN}secret\r", ""},
		{"a:!", ""},
		{"a:*:1000", ""},
		{"a:!$6$saltstring$" + helloKey, ""},
	} {
		_, ok, err := parseLine(tt.line, Normalizer{})
		switch {
		case tt.wrong == "" && (err != nil || !ok):
			t.Errorf("%s: %v", tt.line, err)
		case tt.wrong != "" && (err == nil || ok || !strings.Contains(err.Error(), tt.wrong)):
			t.Errorf("%s: got %v, want %s", tt.line, err, tt.wrong)
		case err != nil && strings.Contains(err.Error(), "secret"):
			t.Errorf("%s: the password is in %v", tt.line, err)
		}
	}
	for _, line := range []string{"", "  ", "# a comment", "#a:{PLAIN}x", "\r"} {
		if _, ok, err := parseLine(line, Normalizer{}); ok || err != nil {
			t.Errorf("%q: got %t, %v", line, ok, err)
		}
	}
}

// TestLongPasswords: bcrypt looks at 72 octets, so a longer password would
// match whatever follows; and the work of SHA-512 grows with the length.
func TestLongPasswords(t *testing.T) {
	bcryptSecret := decoyOf(kind{schemeBcrypt, minCost})
	sha := decoyOf(kind{schemeSHA512, minRounds})
	plain, err := parseSecret("{PLAIN}" + strings.Repeat("x", maxPassword))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		s      secret
		length int
		why    string
	}{
		{bcryptSecret, maxBcrypt, ""},
		{bcryptSecret, maxBcrypt + 1, "72 octets"},
		{bcryptSecret, 8000, "512 octets"},
		{sha, maxPassword, ""},
		{sha, maxPassword + 1, "512 octets"},
		{plain, maxPassword + 1, "512 octets"},
	} {
		ok, why, err := tt.s.matches(strings.Repeat("x", tt.length))
		if ok || err != nil || (why == "") != (tt.why == "") || !strings.Contains(why, tt.why) {
			t.Errorf("%v with %d octets: got %t, %q, %v", tt.s, tt.length, ok, why, err)
		}
	}
	if ok, _, _ := plain.matches(strings.Repeat("x", maxPassword)); !ok {
		t.Error("the longest password does not match")
	}
}

// TestDecoy: an unknown user costs what most users cost.
func TestDecoy(t *testing.T) {
	plain, sha, cheap, dear := kind{scheme: schemePlain}, kind{schemeSHA512, 5000}, kind{schemeBcrypt, 5}, kind{schemeBcrypt, 12}
	for _, tt := range []struct {
		kinds []kind
		want  kind
	}{
		{[]kind{plain}, plain},
		{[]kind{{scheme: schemeLocked}}, plain},
		{[]kind{sha, sha, dear}, sha},
		{[]kind{plain, sha}, sha},
		{[]kind{cheap, dear, sha}, dear},
		{[]kind{dear, sha, sha, {scheme: schemeLocked}, {scheme: schemeLocked}, {scheme: schemeLocked}}, sha},
	} {
		secrets := make(map[string]secret)
		for i, k := range tt.kinds {
			secrets[fmt.Sprint(i)] = secret{kind: k}
		}
		if got := newDecoy(secrets); got.kind != tt.want {
			t.Errorf("%v: got %v, want %v", tt.kinds, got.kind, tt.want)
		}
	}
}

// FuzzPasswd: no panic, no unbounded cost, no secret in a message.
func FuzzPasswd(f *testing.F) {
	f.Add("alice:{PLAIN}hunter2\nbob:$6$saltstring$" + helloKey + "\n# x\n\nroot:{BLF-CRYPT}$2y" + star + ":1:1::/:/:nologin")
	f.Add("a:!\r\na:*\n:\nx")
	f.Add("a:$6$rounds=999999999$a$b\na:$2y$31$x\n")
	f.Fuzz(func(t *testing.T, content string) {
		users, err := parsePasswd("f", []byte(content), Normalizer{Lowercase: true})
		if (users == nil) == (err == nil) {
			t.Fatalf("got %v, %v", users, err)
		}
		if err != nil {
			for line := range strings.SplitSeq(err.Error(), "\n") {
				if !strings.HasPrefix(line, "f:") || !strings.Contains(line, ";") {
					t.Errorf("a poor message: %q", line)
				}
			}
			return
		}
		for user, s := range users.secrets {
			if k := s.kind; k.scheme == schemeSHA512 && (k.cost < minRounds || k.cost > maxRounds) || k.scheme == schemeBcrypt && (k.cost < minCost || k.cost > maxCost) {
				t.Errorf("%s costs %v", user, k)
			}
			if s.kind.cost > 5000 || s.kind.scheme == schemeBcrypt && s.kind.cost > 5 {
				continue // not in a fuzz target
			}
			if ok, _, err := s.matches(""); ok || err != nil {
				t.Errorf("%s: the empty password: %t, %v", user, ok, err)
			}
		}
	})
}
