package integration

import (
	"fmt"
	"io"
	"strings"
	"testing"
	"time"
)

// ends are octets that one server or the other takes, or once took, for the end
// of a message. None of them is one: that is CRLF.CRLF alone (RFC 5321
// §4.1.1.4). In DATA a sender that goes by the book doubles the dot of the last
// two, because CRLF is before it; in BDAT nobody doubles anything.
var ends = []struct {
	name, octets string
	faultless    bool // there is no bare CR or LF in it
	endless      bool // a line is too long for some backends
}{
	{name: "CRLF CR . CRLF", octets: "\r\n\r.\r\n"},
	{name: "LF . LF", octets: "\n.\n"},
	{name: "LF . CRLF", octets: "\n.\r\n"},
	{name: "LF . CR LF LF", octets: "\n.\r\n\n"},
	{name: "CRLF . LF", octets: "\r\n.\n"},
	{name: "CRLF . CR", octets: "\r\n.\r"},
	{name: "CR . CR", octets: "\r.\r"},
	{name: "CR . CRLF", octets: "\r.\r\n"},
	{name: "CRLF . CR CRLF", octets: "\r\n.\r\r\n"},
	{name: "8189 octets . CRLF", octets: "\r\n" + strings.Repeat("x", 8189) + ".\r\n", endless: true},
	{name: "8190 octets . CRLF", octets: "\r\n" + strings.Repeat("x", 8190) + ".\r\n", endless: true},
	{name: "8191 octets . CRLF", octets: "\r\n" + strings.Repeat("x", 8191) + ".\r\n", endless: true},
	{name: "CR CRLF . CRLF", octets: "\r\r\n.\r\n"},
	{name: "CRLF . CRLF", octets: "\r\n.\r\n", faultless: true},
}

// lastTwo are those of ends that end with a real one.
const lastTwo = 2

// TestLMTPSmuggling: a message has in it what another server could take for its
// end, and after that commands which would deliver a forged message to victims
// on both backends. It arrives as one message or is refused; there are as many
// replies as accepted recipients; and nobody gets the forged one.
func TestLMTPSmuggling(t *testing.T) {
	t.Parallel()
	pair, d := newCyrusPair(t, "u0001", "u0002", "u0003"), newDovecot(t)
	s := takesMail(newSite(t, pair.a.backend(), pair.b.backend(), "u0001", "u0002", "u0003"))
	s.addRole("ma02", "c", d.backend(), "u0011", "u0012", "u0013")
	s.doors = append(s.doors, `{protocol: lmtp, address: "$HOST:2400"}`) // trusts nobody
	p := startFrontend(t, s)

	for _, peer := range []struct {
		name, address string
		rcpts         []string
	}{
		{"trusted", p.lmtp(), []string{"u0001@example.org", "u0011@example.org"}},
		{"untrusted", p.host + ":2400", []string{"u0002@example.org", "u0012@example.org"}},
	} {
		arrived := 0
		for _, verb := range []string{"DATA", "BDAT"} {
			for i, end := range ends {
				t.Run(peer.name+"/"+verb+"/"+end.name, func(t *testing.T) {
					octets := end.octets
					if verb == "DATA" && i >= len(ends)-lastTwo {
						octets = stuffed(octets)
					}
					said := smuggle(t, peer.address, verb, octets, peer.rcpts)
					want := "250 "
					switch {
					case peer.name == "trusted" || end.faultless:
					case end.endless:
						want = "554 5.6.0"
					default:
						want = "550 5.6.11"
					}
					for _, r := range said {
						if !strings.HasPrefix(r.String(), want) {
							t.Errorf("%v, want %s", r, want)
						}
					}
					if said[0].accepted() {
						arrived++
					}
				})
			}
		}
		for i, server := range []mailServer{pair.a, d} {
			user := localPart(peer.rcpts[i])
			if has := inbox(t, server, user); len(has) != arrived {
				t.Errorf("%s: %d messages, want %d", user, len(has), arrived)
			}
		}
	}
	mustBeSpared(t, pair.a, d)
}

// victims are on both backends; forgery would get there.
const (
	victims = "RCPT TO:<u0003@example.org>\r\nRCPT TO:<u0013@example.org>\r\n"
	forgery = "RSET\r\nMAIL FROM:<forged@client.test>\r\n" + victims + "DATA\r\nSubject: forged\r\n\r\nforged\r\n"
)

func mustBeSpared(t *testing.T, a, c mailServer) {
	t.Helper()
	for user, server := range map[string]mailServer{"u0003": a, "u0013": c} {
		if has := inbox(t, server, user); len(has) > 0 {
			t.Errorf("%s has got %q", user, has)
		}
	}
}

// smuggle sends the message with octets and the forgery in its midst, and
// returns one reply per recipient. There must be no more.
func smuggle(t *testing.T, address, verb, octets string, rcpts []string) []reply {
	t.Helper()
	l := mustDialLMTP(t, address)
	said, err := l.envelope(sender, rcpts)
	must(t, err)
	for _, r := range said {
		if !r.accepted() {
			t.Fatalf("RCPT: %v", r)
		}
	}
	message := "Subject: two in one\r\nMessage-ID: <" + newParcel().id + "@client.test>\r\n\r\nbefore" + octets + forgery
	if verb == "DATA" {
		r, err := l.command(lmtpLimit, "DATA")
		must(t, err)
		if r.code != 354 {
			t.Fatalf("DATA: %v", r)
		}
		_, err = io.WriteString(l, message+".\r\n")
		must(t, err)
	} else {
		_, err = fmt.Fprintf(l, "BDAT %d LAST\r\n%s", len(message), message)
		must(t, err)
	}
	said, err = l.replies(lmtpLimit, len(rcpts))
	must(t, err)
	must(t, l.silent())
	return said
}

// TestBackendsAreFooled shows that the danger is real: with nobody in between
// both servers take the end of a line that is none for the end of the message,
// and deliver the forged one.
func TestBackendsAreFooled(t *testing.T) {
	t.Parallel()
	pair, d := newCyrusPair(t, "u0001", "u0003"), newDovecot(t)
	for _, c := range []struct {
		server       mailServer
		rcpt, victim string
		octets       string
	}{
		{pair.a, "u0001@example.org", "u0003", "\n.\n"},
		{pair.a, "u0001@example.org", "u0003", "\r\n" + strings.Repeat("x", 8189) + ".\r\n"},
		{d, "u0011@example.org", "u0013", "\n.\n"},
	} {
		before := len(inbox(t, c.server, c.victim))
		l := mustDialLMTP(t, c.server.lmtp())
		_, err := l.envelope(sender, []string{c.rcpt})
		must(t, err)
		must(t, l.say("DATA\r\nSubject: two in one\r\n\r\nbefore%s%s.", c.octets, forgery))
		within(t, 5*time.Second, "the victim has the forged message", func() bool { return len(inbox(t, c.server, c.victim)) > before })
	}
}

// TestLMTPInjection: addresses that carry a command, a parameter or another
// recipient for a backend that unquotes them carelessly. Whatever is said to
// them, they are no way to the victim.
func TestLMTPInjection(t *testing.T) {
	t.Parallel()
	pair, d := newCyrusPair(t, "u0001", "u0003"), newDovecot(t)
	s := takesMail(newSite(t, pair.a.backend(), pair.b.backend(), "u0001", "u0003"), "catch_all: u0001")
	s.addRole("ma02", "c", d.backend(), "u0013")
	p := startFrontend(t, s)
	for _, rcpt := range []string{
		`<"u0003@x> ORCPT=rfc822;a"@y>`,
		`<"u0013@x> ORCPT=rfc822;a"@y>`,
		`<"u0003@example.org>"@y>`,
		`<"u0003\"@example.org> NOTIFY=NEVER"@y>`,
		"<\"u0003@example.org>\rRCPT TO:<u0003@example.org>\"@y>",
		"<a@y>\rRCPT TO:<u0003@example.org>",
		`<u0001@y> ORCPT=rfc822;a+0D+0ARCPT+20TO:<u0003@example.org>`,
		"<u0001@y> ORCPT=rfc822;a\rRCPT TO:<u0003@example.org>",
		`<"u0003"@`,
		`<u0003@example.org,u0001@example.org`,
		`<"u0003@example.org"@y>`,
		`<"u0013@example.org"@y>`,
		`<u0003%example.org@y>`,
		`<"u0001+u0003@example.org"@y>`,
	} {
		l := mustDialLMTP(t, p.lmtp())
		_, err := l.command(lmtpLimit, "MAIL FROM:<%s>", sender)
		must(t, err)
		r, err := l.command(lmtpLimit, "RCPT TO:%s", rcpt)
		must(t, err)
		t.Logf("%q: %v", rcpt, r)
		if r.deferred() {
			t.Errorf("%q is nobody's or somebody's for good, but was told to come again: %v", rcpt, r)
		}
		if _, err = l.command(lmtpLimit, "RSET"); err != nil {
			t.Errorf("%q: the conversation is over: %v", rcpt, err)
			continue
		}
		injected(t, p, rcpt)
	}
	mustBeSpared(t, pair.a, d)
}

// injected sends a whole transaction blindly, as an MTA that pipelines does, and
// reads what comes.
func injected(t *testing.T, p *posthouse, rcpt string) {
	t.Helper()
	l := mustDialLMTP(t, p.lmtp())
	must(t, l.say("MAIL FROM:<%s>\r\nRCPT TO:%s\r\nDATA", sender, rcpt))
	for range 10 {
		r, err := l.reply(lmtpLimit)
		switch {
		case err != nil:
			t.Errorf("%q: %v", rcpt, err)
			return
		case r.code == 354:
			must(t, l.say("Subject: injected\r\n\r\ninjected\r\n."))
			_, err := l.reply(lmtpLimit)
			must(t, err)
			must(t, l.silent())
			return
		case r.code == 503: // to DATA, where no recipient was accepted
			must(t, l.silent())
			return
		}
	}
	t.Errorf("%q: more replies than commands\n%s", rcpt, l.transcript())
}
