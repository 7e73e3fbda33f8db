package catchup

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// answerTo lets a server say text, and returns what answer made of it.
func answerTo(t *testing.T, text string) string {
	t.Helper()
	near, far := net.Pipe()
	defer near.Close()
	near.SetDeadline(time.Now().Add(10 * time.Second))
	go func() {
		io.WriteString(far, text)
		far.Close()
	}()
	rows, err := newSieve(near).answer()
	return strings.TrimSpace(fmt.Sprintf("%q %v", rows, err))
}

// TestSieveAnswer: strings of both kinds, words and codes, and what must end
// the conversation.
func TestSieveAnswer(t *testing.T) {
	for text, want := range map[string]string{
		"OK\r\n": `[] <nil>`,
		"\"a\"\r\n\"b\" ACTIVE\r\nOK \"done\"\r\n":     `[["a"] ["b" "ACTIVE"]] <nil>`,
		"\"a \\\"b\\\\\"\r\nok\r\n":                    `[["a \"b\\"]] <nil>`,
		"{5}\r\na\r\nb!\r\nOK\r\n":                     `[["a\r\nb!"]] <nil>`,
		"{0}\r\n\r\nOK\r\n":                            `[[""]] <nil>`,
		"{2}\r\nxy ACTIVE\r\nOK (TAG {1}\r\nz) x\r\n":  `[["xy" "ACTIVE"]] <nil>`,
		"NO (TRYLATER) \"later\"\r\n":                  `[] the server says ["NO" "(TRYLATER)" "later"]`,
		"BYE \"bye\"\r\n":                              `[] the server says ["BYE" "bye"]`,
		"\"su\"mm\"\r\nOK\r\n":                         `[] a quoted string that does not end: ""`,
		"{9999999}\r\n":                                `[] a string of 9999999 octets`,
		"{-1}\r\n":                                     `[] a literal that begins with {"-1}\r\n"`,
		"{3\r\nabc\r\nOK\r\n":                          `[] a literal that begins with {"3\r\n"`,
		"\"a\"\r\n":                                    `[] EOF`,
		strings.Repeat("x", maxLine+10) + "\r\nOK\r\n": fmt.Sprintf("[] a word of more than %d octets", maxLine),
		strings.Repeat("\"\" ", maxLine):               fmt.Sprintf("[] a line of more than %d octets", maxLine),
		strings.Repeat("\"\"\r\n", maxRows+1):          fmt.Sprintf("[] more than %d lines", maxRows),
	} {
		if got := answerTo(t, text); got != want {
			t.Errorf("%.60q: %s, want %s", text, got, want)
		}
	}
}

// FuzzSieveAnswer: whatever a server says, reading ends.
func FuzzSieveAnswer(f *testing.F) {
	f.Add("\"a\" ACTIVE\r\n{3}\r\nabc\r\nOK (X) \"y\"\r\n")
	f.Fuzz(func(t *testing.T, text string) { answerTo(t, text) })
}

// TestSievePlaintextBehindSTARTTLS: as for IMAP.
func TestSievePlaintextBehindSTARTTLS(t *testing.T) {
	_, a, _ := members("127.0.0.1:1", Options{})
	a.Addresses["sieve"], a.TLS = "127.0.0.1:1", "starttls"
	near, far := net.Pipe()
	defer near.Close()
	go func() {
		io.WriteString(far, "\"STARTTLS\"\r\nOK\r\n")
		far.Read(make([]byte, 100))
		io.WriteString(far, "OK\r\nOK\r\n")
	}()
	err := newSieve(near).logIn(a, "sieve", "u", func() (net.Conn, error) { panic("no TLS over this") })
	if err == nil || !strings.Contains(err.Error(), "plaintext behind") {
		t.Error(err)
	}
}

func TestQuote(t *testing.T) {
	if got, err := quote(`su"mm\er`); got != `"su\"mm\\er"` || err != nil {
		t.Error(got, err)
	}
	if _, err := quote("a\r\nLOGOUT"); err == nil {
		t.Error("a name with a line end became two commands")
	}
}
