package integration

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// way is one row of the matrix: how a stock client logs in and what it then does.
type way struct {
	protocol string
	how      string // login.how
	client   string
	work     func(*testing.T, door, login)
}

// ways is every login that a stock client can do. Each does real work and logs
// out. What a client chooses is not believed but written: curl sends an initial
// response with --sasl-ir only; mbsync where SASL-IR is offered; imtest with
// PLAIN the same; sivtest and sieve-connect always.
var ways = []way{
	{"imap", "PLAIN-IR", "curl", curlMail(20 << 20)},
	{"imap", "PLAIN", "curl", curlMail(10 << 10)},
	{"imap", "LOGIN", "curl", curlMail(10 << 10)},
	{"imap", "USERPASS", "mbsync", mbsyncBothWays},
	{"imap", "PLAIN-IR", "mbsync", mbsyncBothWays},
	{"imap", "USERPASS", "imtest", imtestIdle},
	{"imap", "PLAIN-IR", "imtest", imtestIdle},
	{"pop3", "PLAIN-IR", "curl", curlPop},
	{"pop3", "PLAIN", "curl", curlPop},
	{"pop3", "LOGIN", "curl", curlPop},
	{"pop3", "USERPASS", "pop3test", pop3testPop},
	{"sieve", "PLAIN-IR", "sieve-connect", sieveConnectScripts},
	{"sieve", "LOGIN", "sieve-connect", sieveConnectScripts},
	{"sieve", "PLAIN-IR", "sivtest", sivtestScripts},
	{"sieve", "LOGIN", "sivtest", sivtestScripts},
	{"sieve", "PLAIN-IR", "openssl", opensslScripts},
	{"sieve", "PLAIN", "openssl", opensslScripts},
	{"sieve", "LOGIN", "openssl", opensslScripts},
}

// startTLSOnly are stock clients that know no implicit TLS for ManageSieve
// (sivtest -s: "protocol cannot be SSL-wrapped"). There s_client, with the
// commands typed, stands in for all mechanisms; with STARTTLS, only for what
// the others cannot do.
var startTLSOnly = []string{"sieve-connect", "sivtest"}

func (w way) fits(tls string) bool {
	if tls == "implicit" {
		return !slices.Contains(startTLSOnly, w.client)
	}
	return w.client != "openssl" || w.how == "PLAIN"
}

// everyWay runs the matrix against s, one fresh user per row; the rows run in
// parallel, and end after the calling test function. deliver puts a
// message into a user's INBOX behind s's back, as an MTA would.
func everyWay(t *testing.T, s service, users []string, deliver func(t testing.TB, user, subject string)) {
	t.Helper()
	row := 0
	for _, tls := range []string{"starttls", "implicit"} {
		for _, w := range ways {
			if s.at[w.protocol+"/"+tls] == "" || !w.fits(tls) {
				continue // a door this server does not have
			}
			if s.quotesChallenges && w.client == "sivtest" && w.how == "LOGIN" {
				continue // sivtest waits for ever behind a challenge that is no literal
			}
			user := users[row]
			row++
			t.Run(w.protocol+"/"+tls+"/"+w.how+"/"+w.client, func(t *testing.T) {
				t.Parallel()
				deliver(t, user, "waiting for "+user)
				w.work(t, s.door(t, w.protocol, tls), login{user, w.how})
			})
		}
	}
}

// message makes a message of about size octets that no compression shortens.
func message(subject string, size int) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "From: a@example.org\r\nTo: b@example.org\r\nSubject: %s\r\nDate: Mon, 23 Nov 2026 12:00:00 +0000\r\n"+
		"Message-ID: <%d.%s@example.org>\r\n\r\n", subject, time.Now().UnixNano(), strings.ReplaceAll(subject, " ", "."))
	raw := make([]byte, 57)
	for b.Len() < size {
		rand.Read(raw)
		b.WriteString(base64.StdEncoding.EncodeToString(raw) + "\r\n")
	}
	return b.Bytes()
}

// curlMail: LIST, APPEND, FETCH it again and compare, EXPUNGE nothing.
func curlMail(size int) func(*testing.T, door, login) {
	return func(t *testing.T, d door, l login) {
		if list := string(curl(t, d, l, "")); !strings.Contains(list, "INBOX") {
			t.Fatalf("LIST shows no INBOX: %q", list)
		}
		sent := message("by curl", size)
		curlAppend(t, d, l, sent)
		got := curl(t, d, l, "INBOX;MAILINDEX=2")
		if sha256.Sum256(got) != sha256.Sum256(sent) {
			t.Fatalf("sent %d octets, fetched %d others", len(sent), len(got))
		}
		first := string(curl(t, d, l, "INBOX;MAILINDEX=1"))
		if !strings.Contains(first, "waiting for "+l.user) {
			t.Fatalf("this is not the mail of %s: %q", l.user, first)
		}
	}
}

// mbsyncBothWays: pulls what waits, pushes what was written, pulls both into a
// second Maildir.
func mbsyncBothWays(t *testing.T, d door, l login) {
	box := newMbsync(t, d, l)
	mine := message("by mbsync", 10<<10)
	box.put(t, "1.mine", mine)
	box.sync(t)
	again := newMbsync(t, d, l)
	again.sync(t)
	all := again.messages(t)
	if len(all) != 2 || !slices.Contains(all, string(mine)) {
		t.Fatalf("%d messages came back, mine among them: %v", len(all), slices.Contains(all, string(mine)))
	}
	if !strings.Contains(all[0]+all[1], "waiting for "+l.user) {
		t.Fatalf("the mail of %s is not there", l.user)
	}
}

// imtestIdle: SELECT, IDLE, a message comes from a second login, DONE, LOGOUT.
func imtestIdle(t *testing.T, d door, l login) {
	c := cyrusTest(t, d, l)
	c.say(t, "a1 SELECT INBOX")
	c.expect(t, `(?m)^\* 1 EXISTS`)
	c.expect(t, `(?m)^a1 OK`)
	c.say(t, "a2 IDLE")
	c.expect(t, `(?m)^\+ `)
	curlAppend(t, d, login{l.user, "PLAIN-IR"}, message("while idling", 1000))
	c.expect(t, `(?m)^\* 2 EXISTS`)
	c.say(t, "DONE")
	c.expect(t, `(?m)^a2 OK`)
	c.say(t, "a3 LOGOUT")
	c.expect(t, `(?m)^\* BYE`)
	c.expect(t, `(?m)^a3 OK`)
	c.ended(t)
}

// curlPop: UIDL, RETR, DELE, and UIDL again.
func curlPop(t *testing.T, d door, l login) {
	uidl := string(curl(t, d, l, "", "-X", "UIDL"))
	if !regexp.MustCompile(`^1 \S+\r?\n$`).MatchString(uidl) {
		t.Fatalf("UIDL: %q", uidl)
	}
	if got := string(curl(t, d, l, "1")); !strings.Contains(got, "waiting for "+l.user) {
		t.Fatalf("RETR: %q", got)
	}
	curl(t, d, l, "1", "-X", "DELE", "-l")
	if uidl := string(curl(t, d, l, "", "-X", "UIDL")); strings.TrimSpace(uidl) != "" {
		t.Fatalf("UIDL after DELE: %q", uidl)
	}
}

// pop3testPop: the same in one session, then a second to see that DELE lasted.
func pop3testPop(t *testing.T, d door, l login) {
	c := cyrusTest(t, d, l)
	c.say(t, "UIDL")
	c.expect(t, `(?m)^\+OK`)
	c.expect(t, `(?m)^1 \S+\r?\n\.\r?$`)
	c.say(t, "RETR 1")
	c.expect(t, `waiting for `+l.user)
	c.expect(t, `(?m)^\.\r?$`)
	c.say(t, "DELE 1")
	c.expect(t, `(?m)^\+OK`)
	c.say(t, "QUIT")
	c.expect(t, `(?m)^\+OK`)
	c.ended(t)

	c = cyrusTest(t, d, l)
	c.say(t, "STAT")
	c.expect(t, `(?m)^\+OK 0 0`)
	c.say(t, "QUIT")
	c.expect(t, `(?m)^\+OK`)
	c.ended(t)
}

const sieveScript = "require \"fileinto\";\r\nif header :contains \"Subject\" \"spam\" { fileinto \"Junk\"; }\r\n"

// sieveConnectScripts: upload, activate, list, download and compare.
func sieveConnectScripts(t *testing.T, d door, l login) {
	dir := newDir(t, "script")
	writeFile(t, dir+"/mine.sieve", sieveScript)
	out := sieveConnect(t, d, l, "put "+dir+"/mine.sieve mine", "activate mine", "list", "get mine "+dir+"/back", "quit")
	if !regexp.MustCompile(`"mine" ACTIVE`).MatchString(out) {
		t.Fatalf("mine is not active:\n%s", out)
	}
	if back := readFile(t, dir+"/back"); strings.TrimSpace(back) != strings.TrimSpace(sieveScript) {
		t.Fatalf("the script came back as %q", back)
	}
}

// sivtestScripts: PUTSCRIPT, SETACTIVE, LISTSCRIPTS, GETSCRIPT, LOGOUT.
func sivtestScripts(t *testing.T, d door, l login) {
	c := cyrusTest(t, d, l)
	manageScripts(t, c)
}

// opensslScripts is for the logins that no stock client does: typed into
// s_client.
func opensslScripts(t *testing.T, d door, l login) {
	c := openssl(t, d)
	c.expect(t, `(?m)^OK`)
	switch l.how {
	case "PLAIN-IR":
		c.say(t, `AUTHENTICATE "PLAIN" "%s"`, plain("", l.user, password))
	case "PLAIN":
		c.say(t, `AUTHENTICATE "PLAIN"`)
		c.expect(t, `(?m)^(\{0\}\r?\n|""\r?$)`)
		c.say(t, `"%s"`, plain("", l.user, password))
	case "LOGIN":
		c.say(t, `AUTHENTICATE "LOGIN"`)
		for _, answer := range []string{l.user, password} {
			c.expect(t, `(?m)^"?[A-Za-z0-9+/]+=*"?\r?\n`) // quoted, or behind {n}
			c.say(t, `"%s"`, base64.StdEncoding.EncodeToString([]byte(answer)))
		}
	}
	c.expect(t, `(?m)^OK`)
	manageScripts(t, c)
}

func manageScripts(t *testing.T, c *conversation) {
	c.say(t, "PUTSCRIPT \"mine\" {%d+}\r\n%s", len(sieveScript), sieveScript)
	c.expect(t, `(?m)^OK`)
	c.say(t, `SETACTIVE "mine"`)
	c.expect(t, `(?m)^OK`)
	c.say(t, `LISTSCRIPTS`)
	c.expect(t, `(?m)^"mine" ACTIVE\r?\n`)
	c.expect(t, `(?m)^OK`)
	c.say(t, `GETSCRIPT "mine"`)
	c.expect(t, regexp.QuoteMeta(strings.Split(sieveScript, "\r\n")[1]))
	c.expect(t, `(?m)^OK`)
	c.say(t, `LOGOUT`)
	c.expect(t, `(?m)^OK`)
	c.ended(t)
}
