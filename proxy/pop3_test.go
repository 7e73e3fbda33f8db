package proxy

import (
	"bytes"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/posthouse/posthouse/proxy/auth"
)

// heard is a connection whose peer has said all that it will say, and that
// keeps what is written to it.
type heard struct {
	net.Conn // nil: nothing else is called
	r        io.Reader
	written  bytes.Buffer
}

func (h *heard) Read(p []byte) (int, error)  { return h.r.Read(p) }
func (h *heard) Write(p []byte) (int, error) { return h.written.Write(p) }

// hears returns a lineConn at whose other end somebody has said words.
func hears(t testing.TB, words string) (*lineConn, *bytes.Buffer) {
	h := &heard{r: strings.NewReader(words)}
	return newLineConn(t.Context(), h, readAhead), &h.written
}

var secured = offer{hostname: "mail.test", mechanisms: auth.Names()}

func TestCutPOP3Command(t *testing.T) {
	for _, test := range []struct{ line, verb, argument string }{
		{"QUIT", "QUIT", ""},
		{"quit", "QUIT", ""},
		{"pass  two  spaces ", "PASS", " two  spaces "},
		{"USER ü", "USER", "ü"},
		{"", "", ""},
		{" QUIT", "", "QUIT"},
	} {
		if verb, argument := cutPOP3Command([]byte(test.line)); verb != test.verb || argument != test.argument {
			t.Errorf("%q: %q %q", test.line, verb, argument)
		}
	}
}

func TestPOP3Commands(t *testing.T) {
	plain := func(initial string) request { return request{mechanism: "PLAIN", initial: []byte(initial)} }
	for _, test := range []struct {
		name  string
		said  string
		offer offer
		want  request
		err   error
		reply string
	}{
		{"user and pass", "user alice\r\nPass  a b \r\n", secured, plain("\x00alice\x00 a b "), nil, "+OK\r\n"},
		{"pass first", "PASS x\r\nQUIT\r\n", secured, request{}, errClientLeft, "-ERR USER comes first\r\n+OK Bye\r\n"},
		{"NUL", "USER a\x00b\r\n", secured, request{}, errClientLeft, "-ERR NUL in a command\r\n"},
		{"user without TLS", "USER alice\r\n", offer{startTLS: true}, request{mechanism: "PLAIN"}, nil, ""},
		{"auth", "AUTH plain\r\n", secured, request{mechanism: "PLAIN"}, nil, ""},
		{"auth with initial response", "AUTH PLAIN AGEAYg==\r\n", secured, plain("\x00a\x00b"), nil, ""},
		{"empty initial response", "AUTH PLAIN =\r\n", secured, plain(""), nil, ""},
		{"no base64", "AUTH PLAIN !\r\n", secured, request{}, errClientLeft, "-ERR the initial response is not base64\r\n"},
		{"auth alone", "AUTH\r\n", secured, request{}, errClientLeft, "+OK\r\nPLAIN\r\nLOGIN\r\n.\r\n"},
		{"auth alone without TLS", "AUTH\r\n", offer{}, request{}, errClientLeft, "+OK\r\n.\r\n"},
		{"stls", "STLS\r\n", offer{startTLS: true}, request{startTLS: true}, nil, ""},
		{"stls twice", "STLS\r\n", secured, request{}, errClientLeft, "-ERR TLS is on already\r\n"},
		{"not offered", "UTF8\r\n", secured, request{}, errClientLeft, "-ERR unknown command, or not before the login\r\n"},
		{"capa", "CAPA\r\n", offer{startTLS: true}, request{}, errClientLeft, "+OK\r\nPIPELINING\r\nRESP-CODES\r\nAUTH-RESP-CODE\r\nSTLS\r\n.\r\n"},
		{
			"capa over TLS", "capa\r\n", offer{mechanisms: auth.Names(), shared: []string{"TOP", "EXPIRE NEVER", "UIDL"}}, request{}, errClientLeft,
			"+OK\r\nPIPELINING\r\nRESP-CODES\r\nAUTH-RESP-CODE\r\nUIDL\r\nTOP\r\nUSER\r\nSASL PLAIN LOGIN\r\n.\r\n",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, written := hears(t, test.said)
			got, err := (&pop3Dialect{}).next(c, test.offer)
			if !errors.Is(err, test.err) || err == nil && !sameRequest(got, test.want) {
				t.Errorf("got %+v, %v", got, err)
			}
			if written.String() != test.reply {
				t.Errorf("replied %q", written.String())
			}
		})
	}
}

func sameRequest(a, b request) bool {
	return a.tag == b.tag && a.startTLS == b.startTLS && a.mechanism == b.mechanism && bytes.Equal(a.initial, b.initial) &&
		(a.initial == nil) == (b.initial == nil)
}

func TestPOP3LineTooLong(t *testing.T) {
	c, _ := hears(t, "USER "+strings.Repeat("x", maxLine)+"\r\n")
	if _, err := (&pop3Dialect{}).next(c, secured); reasonOf(err) != TooLong {
		t.Error(err)
	}
}

func TestPOP3EveryReasonHasAnAnswer(t *testing.T) {
	for r := range Reason(len(reasonNames)) {
		if pop3Answers[r] == "" || sieveAnswers[r] == "" {
			t.Errorf("no answer for %v", r)
		}
		if strings.HasPrefix(sieveAnswers[r], "BYE") != r.closes() {
			t.Errorf("%v: %s", r, sieveAnswers[r])
		}
	}
}

func TestParsePOP3Answer(t *testing.T) {
	for _, test := range []struct{ line, status, code, text string }{
		{"+OK", "+OK", "", ""},
		{"+ok Logged in.", "+OK", "", "Logged in."},
		{"+OK [XCLIENT] Dovecot ready.", "+OK", "XCLIENT", "Dovecot ready."},
		{"-ERR [sys/temp]", "-ERR", "SYS/TEMP", ""},
		{"-ERR [half", "-ERR", "", "[half"},
		{"+ ", "+", "", ""},
		{"+", "+", "", ""},
		{"* OK", "*", "", "OK"},
		{"", "", "", ""},
	} {
		a := parsePOP3Answer([]byte(test.line))
		if a.status != test.status || a.code != test.code || a.text != test.text {
			t.Errorf("%q: %q %q %q", test.line, a.status, a.code, a.text)
		}
	}
}

func TestPOP3Meet(t *testing.T) {
	for _, test := range []struct {
		name, said string
		caps       []string
		fails      bool
	}{
		{"cyrus", "+OK be1 ready <1@be1>\r\n+OK\r\nSASL  plain login\r\nUIDL\r\n.\r\n", []string{"SASL PLAIN LOGIN", "UIDL"}, false},
		{"dovecot", "+OK [XCLIENT] ready\r\n+OK\r\nTOP\r\n.\r\n", []string{"TOP", "XCLIENT"}, false},
		{"no CAPA", "+OK ready\r\n-ERR what?\r\n", nil, false},
		{"refuses", "-ERR [SYS/TEMP] too busy\r\n", nil, true},
		{"no POP3", "* OK ready\r\n", nil, true},
		{"no end", "+OK ready\r\n+OK\r\n" + strings.Repeat("X\r\n", mostCapabilities+1), nil, true},
		{"long line", "+OK " + strings.Repeat("x", 1<<20), nil, true},
		{"closes", "", nil, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			b, _ := hears(t, test.said)
			caps, err := (&pop3Dialect{}).meet(b)
			if (err != nil) != test.fails || !slices.Equal(caps, test.caps) {
				t.Errorf("%q, %v", caps, err)
			}
		})
	}
}

func TestPOP3LogIn(t *testing.T) {
	alice := auth.Credentials{Authcid: "alice", Password: "secret"}
	long := auth.Credentials{Authcid: "alice", Password: strings.Repeat("x", 300)}
	sasl := []string{"SASL PLAIN"}
	for _, test := range []struct {
		name, said string
		announced  []string
		as         auth.Credentials
		reason     Reason // Reason(-1): let in
		claimed    bool
		asks       string // how what we send begins
	}{
		{"let in", "+OK in\r\n", sasl, alice, -1, true, "AUTH PLAIN AGFsaWNlAHNlY3JldA==\r\n"},
		{"long", "+ \r\n+OK in\r\n", sasl, long, -1, true, "AUTH PLAIN\r\nAGFsaWNlAHh4"},
		{"let in unseen", "+OK in\r\n", sasl, long, Misconfigured, false, "AUTH PLAIN\r\n"},
		{"no PLAIN", "", []string{"SASL LOGIN", "STLS"}, alice, Misconfigured, false, ""},
		{"wrong", "-ERR [AUTH] no\r\n", sasl, alice, WrongCredentials, false, "AUTH"},
		{"no code", "-ERR no\r\n", sasl, alice, WrongCredentials, false, "AUTH"},
		{"no code though announced", "-ERR no\r\n", []string{"SASL PLAIN", "AUTH-RESP-CODE"}, alice, Unavailable, false, "AUTH"},
		{"in use", "-ERR [IN-USE] no\r\n", sasl, alice, InUse, false, "AUTH"},
		{"delay", "-ERR [LOGIN-DELAY] no\r\n", sasl, alice, LoginDelay, false, "AUTH"},
		{"fault", "-ERR [SYS/PERM] no\r\n", sasl, alice, Unavailable, false, "AUTH"},
		{"silence", "", sasl, alice, Unavailable, true, "AUTH"},
		{"babble", "* what\r\n", sasl, alice, Unavailable, true, "AUTH"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b, written := hears(t, test.said)
			_, err := (&pop3Dialect{}).logIn(b, test.announced, test.as, origin{})
			if (err == nil) != (test.reason == -1) || err != nil && reasonOf(err) != test.reason {
				t.Error(err)
			}
			if b.claimed != test.claimed {
				t.Errorf("claimed: %v", b.claimed)
			}
			if !strings.HasPrefix(written.String(), test.asks) || test.asks == "" && written.Len() > 0 {
				t.Errorf("sent %q", written.String())
			}
		})
	}
}

func TestPrintable(t *testing.T) {
	for text, want := range map[string]string{
		"Logged in.":                   "Logged in.",
		"a\r\nb\x00c\x7f\xffd":         "abcd",
		strings.Repeat("ü", 400):       strings.Repeat("ü", mostText/2),
		"x" + strings.Repeat("ü", 400): "x" + strings.Repeat("ü", mostText/2-1),
	} {
		if got := printable(text); got != want {
			t.Errorf("%q: %q", text, got)
		}
	}
}

// FuzzPOP3Lines feeds a client's input. Every line gets one answer, and
// credentials come out whole.
func FuzzPOP3Lines(f *testing.F) {
	for _, seed := range []string{
		"USER alice\r\nPASS s e c \r\nSTAT\r\n", "AUTH PLAIN =\r\n", "AUTH\r\nCAPA\r\nQUIT\r\n", "auth login\nSTLS\r\n", "PASS\r\n", "\x00\r\n\r\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		c, written := hears(t, string(said))
		c.mostStrikes = 10
		req, err := (&pop3Dialect{}).next(c, secured)
		switch {
		case err != nil && errors.Is(err, errClientLeft), err != nil && reasonOf(err) == TooMany, err != nil && reasonOf(err) == TooLong,
			err != nil && c.dead:
		case err != nil:
			t.Errorf("unexpected %v", err)
		case req.startTLS:
			t.Error("STLS although TLS is on")
		case req.mechanism == "":
			t.Error("neither TLS nor credentials")
		}
		for line := range strings.Lines(strings.ReplaceAll(written.String(), "\r\n.\r\n", "\r\n")) {
			if !strings.HasSuffix(line, "\r\n") || strings.ContainsAny(strings.TrimSuffix(line, "\r\n"), "\r\x00") {
				t.Errorf("answered %q", line)
			}
		}
		if answers := strings.Count(written.String(), "+OK") + strings.Count(written.String(), "-ERR"); answers > bytes.Count(said, []byte("\n")) {
			t.Errorf("%d answers to %q", answers, said)
		}
	})
}
