package proxy

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// peerFaults are what other frontends get wrong in these protocols, and where
// posthouse shows that it does not: transcripts, or tests of this package.
var peerFaults = []struct {
	fault string
	shown []string
}{
	{"the route is resolved before the hold", []string{"TestParked"}},
	{"a session is registered only after its login", []string{"TestRevokedDuringLogin"}},
	{"a lookup that fails leads to a default, or to a wrong password", []string{"imap/no-user", "pop3/no-user", "sieve/no-user"}},
	{"spliced after a failed login at the backend", []string{"imap/literal-sync", "pop3/backend-failed-login", "sieve/backend-refusals"}},
	{"plaintext behind the backend's STARTTLS is believed", []string{"imap/backend-starttls-injection", "pop3/backend-stls-injection", "sieve/backend-starttls-injection"}},
	{"UTF8 is accepted and never told to the backend", []string{"pop3/utf8"}},
	{"a literal marker is found inside quotes, literals are refused", []string{"imap/literal-in-quotes", "imap/literal-sync", "sieve/literal-in-quotes"}},
	{"a capability block is passed on as an answer", []string{"sieve/backend-capabilities-before-ok", "sieve/backend-capabilities-behind-ok", "sieve/login-starttls"}},
	{"literals in LOGIN and ID break the parser once IMAP4rev2 is listed", []string{"imap/outlook-rev2"}},
	{"a token is listed that does not work", []string{"imap/login-starttls", "pop3/login-stls", "sieve/login-starttls"}},
	{"LOGOUT ends in a broken pipe", []string{"imap/logout-half-close", "pop3/quit-half-close", "sieve/logout-half-close"}},
	{"a refused connection keeps its slot", []string{"TestConnectionLimits"}},
	{"lines of 128 octets are too long", []string{"pop3/long-token"}},
	{"an extra untagged line of the backend breaks the login", []string{"imap/backend-untagged", "imap/sasl-login", "pop3/backend-babble"}},
	{"decoded credentials are written raw", []string{"imap/control-characters", "pop3/control-characters", "pop3/control-characters-replay", "sieve/control-characters"}},
	{"a backend that accepts and says nothing is up", []string{"imap/backend-silent-greeting", "pop3/backend-silent-greeting", "sieve/backend-silent-greeting"}},
	{"the frontend hangs with the backend", []string{"imap/backend-silent-login", "pop3/backend-silent-login", "sieve/backend-silent-login", "pop3/switch-backend-hangs"}},
	{"no second try while a server restarts", []string{"imap/backend-bye-then-ok", "pop3/backend-banner-err-then-ok"}},
}

func TestPeerFaultsAreCovered(t *testing.T) {
	var tests strings.Builder
	files, err := filepath.Glob("*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		tests.Write(text)
	}
	for _, row := range peerFaults {
		for _, name := range row.shown {
			if strings.HasPrefix(name, "Test") {
				if !regexp.MustCompile(`(?m)^func ` + name + `\(`).MatchString(tests.String()) {
					t.Errorf("%s: no test %s", row.fault, name)
				}
				continue
			}
			if _, err := os.Stat(filepath.Join("testdata", name+".txt")); err != nil {
				t.Errorf("%s: %v", row.fault, err)
			}
		}
	}
}
