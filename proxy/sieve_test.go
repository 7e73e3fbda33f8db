package proxy

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/posthouse/posthouse/proxy/auth"
)

// show writes a line's items down: atoms bare, strings in quotes.
func (l sieveLine) show() string {
	var words []string
	for _, item := range l.items {
		switch item.kind {
		case sieveString:
			words = append(words, fmt.Sprintf("%q", item.text))
		case sieveOpen:
			words = append(words, "(")
		case sieveClose:
			words = append(words, ")")
		default:
			words = append(words, string(item.text))
		}
	}
	return strings.Join(words, " ")
}

func TestReadSieveLine(t *testing.T) {
	for _, test := range []struct{ name, said, want, fault, rest string }{
		{"atom", "LOGOUT\r\nX", "LOGOUT", "", "X"},
		{"bare LF", "LOGOUT\nX", "LOGOUT", "", "X"},
		{"empty", "\r\n", "", "", ""},
		{"quoted", `NOOP "a \"b\\ c"` + "\r\n", `NOOP "a \"b\\ c"`, "", ""},
		{"8-bit", "NOOP \"ü\"\r\n", `NOOP "ü"`, "", ""},
		{"empty string", "NOOP \"\"\r\n", `NOOP ""`, "", ""},
		{"literal", "NOOP {3+}\r\nabc\r\nX", `NOOP "abc"`, "", "X"},
		{"old literal", "NOOP {3}\r\nabc\r\nX", `NOOP "abc"`, "", "X"},
		{"empty literal", "NOOP {0+}\r\n\r\nX", `NOOP ""`, "", "X"},
		{"literal with line ends", "NOOP {4+}\r\na\r\nb\r\nX", `NOOP "a\r\nb"`, "", "X"},
		{"two literals", "A {1+}\r\nx {1}\r\ny\r\n", `A "x" "y"`, "", ""},
		{"literal alone", "{1+}\r\nx\r\n", `"x"`, "", ""},
		{"marker inside quotes", "NOOP \"a{5}\"\r\nX", `NOOP "a{5}"`, "", "X"},
		{"marker inside open quotes", "NOOP \"a{5}\r\nX", "", "unterminated quoted string", "X"},
		{"escaped quote before a marker", `NOOP "a\"{5}` + "\r\nX", "", "unterminated quoted string", "X"},
		{"marker glued to an atom", "NOOP{3+}\r\nabc\r\nX", "", "no space before a literal", "X"},
		{"literal behind a fault", "NOOP } {3+}\r\nabc\r\nX", "", "unexpected character", "X"},
		{"no space behind a literal", "A {1+}\r\nx\"y\"\r\nX", "", "no space between two arguments", "X"},
		{"no space between strings", `A "x""y"` + "\r\nX", "", "no space between two arguments", "X"},
		{"NUL in a literal", "A {1+}\r\n\x00\r\nX", "", "NUL in a string", "X"},
		{"NUL in quotes", "A \"\x00\"\r\nX", "", "control character in a quoted string", "X"},
		{"NUL outside", "A \x00\r\nX", "", "unexpected character", "X"},
		{"bad escape", `A "\n"` + "\r\nX", "", "bad escape in a quoted string", "X"},
		{"no digits", "A {+}\r\nX", "", "unexpected character", "X"},
		{"sign", "A {+3}\r\nX", "", "unexpected character", "X"},
		{"response code", `NO (QUOTA/MAXSIZE) "x"` + "\r\n", `NO ( QUOTA/MAXSIZE ) "x"`, "", ""},
		{"response code with data", `OK (SASL "x") "y"` + "\r\n", `OK ( SASL "x" ) "y"`, "", ""},
		{"literal in a response code", "OK (TAG {1}\r\nx) \"y\"\r\n", `OK ( TAG "x" ) "y"`, "", ""},
		{"too many items", strings.Repeat("a ", mostSieveItems+1) + "\r\nX", "", "too many arguments", "X"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, _ := hears(t, test.said)
			l, err := readSieveLine(c)
			if err != nil {
				t.Fatal(err)
			}
			if l.show() != test.want || l.fault != test.fault {
				t.Errorf("read %s, fault %q", l.show(), l.fault)
			}
			if rest := string(c.ahead()); rest != test.rest {
				t.Errorf("left %q", rest)
			}
		})
	}
}

func TestReadSieveLineBounds(t *testing.T) {
	for name, said := range map[string]string{
		"literal":  fmt.Sprintf("A {%d+}\r\n", maxLiteral+1),
		"2 GB":     "A {2147483648}\r\n",
		"19 zeros": "A {999999999999999999+}\r\n",
		"number":   "A " + strings.Repeat("{0+}\r\n ", mostSieveLiterals+1),
		"line":     "A \"" + strings.Repeat("x", maxLine),
	} {
		c, _ := hears(t, said)
		if _, err := readSieveLine(c); reasonOf(err) != TooLong {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSieveCommands(t *testing.T) {
	plain := func(initial string) request { return request{mechanism: "PLAIN", initial: []byte(initial)} }
	for _, test := range []struct {
		name  string
		said  string
		offer offer
		want  request
		err   error
		reply string
	}{
		{"authenticate", "authenticate \"plain\"\r\n", secured, request{mechanism: "PLAIN"}, nil, ""},
		{"initial response", "AUTHENTICATE \"PLAIN\" \"AGEAYg==\"\r\n", secured, plain("\x00a\x00b"), nil, ""},
		{"initial response in a literal", "AUTHENTICATE {5+}\r\nPLAIN {8}\r\nAGEAYg==\r\n", secured, plain("\x00a\x00b"), nil, ""},
		{"empty initial response", "AUTHENTICATE \"PLAIN\" \"\"\r\n", secured, plain(""), nil, ""},
		{"= as initial response", "AUTHENTICATE \"PLAIN\" \"=\"\r\n", secured, plain(""), nil, ""},
		{"no base64", "AUTHENTICATE \"PLAIN\" \"!\"\r\n", secured, request{}, errClientLeft, "NO \"the initial response is not base64\"\r\n"},
		{"no string", "AUTHENTICATE PLAIN\r\n", secured, request{}, errClientLeft, "NO \"arguments are strings\"\r\n"},
		{"starttls", "STARTTLS\r\n", offer{startTLS: true}, request{startTLS: true}, nil, ""},
		{"starttls twice", "STARTTLS\r\n", secured, request{}, errClientLeft, "NO \"TLS is on already\"\r\n"},
		{"noop", "NOOP\r\nNOOP \"a\\\"b\"\r\nnoop {2+}\r\n\r\n\r\n", secured, request{}, errClientLeft, "OK \"NOOP completed.\"\r\nOK (TAG \"a\\\"b\") \"Done.\"\r\nOK (TAG {2}\r\n\r\n) \"Done.\"\r\n"},
		{"logout", "LOGOUT\r\n", secured, request{}, errClientLeft, "OK \"Logging out.\"\r\n"},
		{"not before login", "UNAUTHENTICATE\r\n", secured, request{}, errClientLeft, "NO \"unknown command, or not before the login\"\r\n"},
		{"nothing", "\r\n\"CAPABILITY\"\r\n", secured, request{}, errClientLeft, "NO \"missing command\"\r\nNO \"missing command\"\r\n"},
		{
			"capability", "CAPABILITY\r\n", offer{startTLS: true}, request{}, errClientLeft,
			"\"IMPLEMENTATION\" \"posthouse\"\r\n\"SIEVE\" \"\"\r\n\"SASL\" \"\"\r\n\"STARTTLS\"\r\n\"VERSION\" \"1.0\"\r\nOK \"Capability completed.\"\r\n",
		},
		{
			"capability over TLS", "CAPABILITY\r\n",
			offer{mechanisms: auth.Names(), shared: []string{"SIEVE fileinto", "NOTIFY mailto", "UNAUTHENTICATE", "SIEVE copy", "SASL PLAIN"}}, request{}, errClientLeft,
			"\"IMPLEMENTATION\" \"posthouse\"\r\n\"SIEVE\" \"fileinto copy\"\r\n\"NOTIFY\" \"mailto\"\r\n\"SASL\" \"PLAIN LOGIN\"\r\n\"VERSION\" \"1.0\"\r\nOK \"Capability completed.\"\r\n",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			c, written := hears(t, test.said)
			got, err := (&sieveDialect{}).next(c, test.offer)
			if !errors.Is(err, test.err) || err == nil && !sameRequest(got, test.want) {
				t.Errorf("got %+v, %v", got, err)
			}
			if written.String() != test.reply {
				t.Errorf("replied %q", written.String())
			}
		})
	}
}

func TestSieveChallenge(t *testing.T) {
	for _, test := range []struct {
		said, want string
		reason     Reason // Reason(-1): none
	}{
		{"\"AGEAYg==\"\r\n", "\x00a\x00b", -1},
		{"{8+}\r\nAGEAYg==\r\n", "\x00a\x00b", -1},
		{"\"\"\r\n", "", -1},
		{"\"*\"\r\n", "", Cancelled},
		{"*\r\n", "", Cancelled},
		{"AGEAYg==\r\n", "", Malformed},
		{"\"!\"\r\n", "", Malformed},
		{"\"YQ==\" \"YQ==\"\r\n", "", Malformed},
		{"\r\n", "", Malformed},
	} {
		c, written := hears(t, test.said)
		got, err := (&sieveDialect{}).challenge(c, []byte("Username:"))
		if (err == nil) != (test.reason == -1) || err != nil && reasonOf(err) != test.reason || string(got) != test.want {
			t.Errorf("%q: %q, %v", test.said, got, err)
		}
		if written.String() != "{12}\r\nVXNlcm5hbWU6\r\n" {
			t.Errorf("challenge %q", written.String())
		}
	}
}

func TestSieveMeet(t *testing.T) {
	for _, test := range []struct {
		name, said string
		tokens     []string
		reason     Reason // Reason(-1): none
	}{
		{"cyrus", "\"SIEVE\" \"fileinto  copy\"\r\n\"sasl\" \"PLAIN\"\r\n\"STARTTLS\"\r\nOK\r\n", []string{"SIEVE fileinto", "SIEVE copy", "SASL PLAIN", "STARTTLS"}, -1},
		{"literals", "{5}\r\nSIEVE {4}\r\ncopy\r\n\"SASL\" \"\"\r\nOK {1}\r\nx\r\n", []string{"SIEVE copy", "SASL"}, -1},
		{"bye", "BYE (TRYLATER) \"later\"\r\n", nil, Unavailable},
		{"referral", "BYE (REFERRAL \"sieve://other\") \"there\"\r\n", nil, RoleDisagreement},
		{"referral in OK", "OK (REFERRAL \"sieve://other\") \"there\"\r\n", nil, RoleDisagreement},
		{"no ManageSieve", "* OK ready\r\n", nil, Unavailable},
		{"no end", strings.Repeat("\"X\"\r\n", mostCapabilities+1), nil, Unavailable},
		{"large literal", "\"X\" {99999999}\r\n", nil, TooLong}, // ofBackend: Unavailable
	} {
		t.Run(test.name, func(t *testing.T) {
			b, _ := hears(t, test.said)
			tokens, err := (&sieveDialect{}).meet(b)
			if (err == nil) != (test.reason == -1) || err != nil && reasonOf(err) != test.reason || !slices.Equal(tokens, test.tokens) {
				t.Errorf("%q, %v", tokens, err)
			}
		})
	}
}

func TestSieveLogIn(t *testing.T) {
	alice := auth.Credentials{Authcid: "alice", Password: "secret"}
	long := auth.Credentials{Authcid: "alice", Password: strings.Repeat("x", 2000)}
	for _, test := range []struct {
		name, said string
		as         auth.Credentials
		reason     Reason // Reason(-1): let in
		claimed    bool
		asks       string // how what we send begins
	}{
		{"let in", "OK\r\n", alice, -1, true, "AUTHENTICATE \"PLAIN\" \"AGFsaWNlAHNlY3JldA==\"\r\n"},
		{"long", "OK\r\n", long, -1, true, "AUTHENTICATE \"PLAIN\" {2676+}\r\nAGFsaWNlAHh4"},
		{"capabilities before the answer", "\"SIEVE\" \"x\"\r\n\"STARTTLS\"\r\nOK \"in\"\r\n", alice, -1, true, "AUTH"},
		{"capabilities behind the answer", "OK \"in\"\r\n\"SIEVE\" \"x\"\r\nOK\r\n", alice, -1, true, "AUTH"},
		{"wrong", "NO \"no\"\r\n", alice, WrongCredentials, false, "AUTH"},
		{"later", "NO (TRYLATER) \"no\"\r\n", alice, Unavailable, false, "AUTH"},
		{"bye", "BYE \"no\"\r\n", alice, Unavailable, false, "AUTH"},
		{"unknown code", "NO (X-ODD) \"no\"\r\n", alice, Unavailable, false, "AUTH"},
		{"wants TLS", "NO (ENCRYPT-NEEDED) \"no\"\r\n", alice, Misconfigured, false, "AUTH"},
		{"referral", "NO (REFERRAL \"sieve://other\") \"no\"\r\n", alice, RoleDisagreement, false, "AUTH"},
		{"let in and referred", "OK (REFERRAL \"sieve://other\") \"in\"\r\n", alice, RoleDisagreement, true, "AUTH"},
		{"silence", "", alice, Unavailable, true, "AUTH"},
	} {
		t.Run(test.name, func(t *testing.T) {
			b, written := hears(t, test.said)
			_, err := (&sieveDialect{}).logIn(b, []string{"SASL PLAIN"}, test.as, origin{})
			if (err == nil) != (test.reason == -1) || err != nil && reasonOf(err) != test.reason {
				t.Error(err)
			}
			if b.claimed != test.claimed {
				t.Errorf("claimed: %v", b.claimed)
			}
			if !strings.HasPrefix(written.String(), test.asks) {
				t.Errorf("sent %q", written.String())
			}
			if b.pipelined() {
				t.Errorf("left %q for the client", b.ahead())
			}
		})
	}
	b, written := hears(t, "")
	if _, err := (&sieveDialect{}).logIn(b, []string{"SASL LOGIN"}, alice, origin{}); reasonOf(err) != Misconfigured || b.claimed || written.Len() > 0 {
		t.Errorf("without PLAIN: %v, sent %q", err, written.String())
	}
}

// FuzzSieveStrings feeds the reader of both sides. What it has read, written
// again, reads the same.
func FuzzSieveStrings(f *testing.F) {
	for _, seed := range []string{
		"AUTHENTICATE \"PLAIN\" {8+}\r\nAGEAYg==\r\n", "NOOP \"a{5}\r\nb\"\r\n", "OK (TAG {1}\r\nx) \"y\"\r\n",
		"A {0}\r\n {0+}\r\n\r\n", "\"\\\"\\\\\"\r\n", "{99999999999}\r\n", "NO (QUOTA/MAXSIZE) \"x\"\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, said []byte) {
		c, _ := hears(t, string(said))
		l, err := readSieveLine(c)
		if err != nil {
			if reasonOf(err) != TooLong && !errors.Is(err, errClientLeft) && !c.dead {
				t.Errorf("unexpected %v", err)
			}
			return
		}
		if l.fault != "" {
			if l.items != nil {
				t.Errorf("items %s of a line that is no line", l.show())
			}
			return
		}
		again, _ := hears(t, l.write())
		back, err := readSieveLine(again)
		if err != nil || back.fault != "" || back.show() != l.show() {
			t.Errorf("%q was read as %s, then as %s (%s, %v)", said, l.show(), back.show(), back.fault, err)
		}
		if again.pipelined() {
			t.Errorf("%q: left %q", l.write(), again.ahead())
		}
	})
}

func (l sieveLine) write() string {
	var s strings.Builder
	space := false
	for _, item := range l.items {
		if space && item.kind != sieveClose {
			s.WriteByte(' ')
		}
		space = item.kind != sieveOpen
		switch item.kind {
		case sieveString:
			s.WriteString(sieveText(item.text, "+"))
		case sieveOpen:
			s.WriteByte('(')
		case sieveClose:
			s.WriteByte(')')
		default:
			s.Write(item.text)
		}
	}
	return s.String() + "\r\n"
}
