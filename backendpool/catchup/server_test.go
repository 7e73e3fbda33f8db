package catchup

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/posthouse/posthouse/backendpool"
)

// script is what a server answers: the beginning of a command, without its tag,
// and the answer, in which $ is the tag. The last that fits counts. An empty
// answer hangs up.
type script [][2]string

const capabilities = "CAPABILITY IMAP4rev1 SASL-IR LIST-EXTENDED NAMESPACE"

// plainServer is a server with one mailbox of one message, which says no more
// than it must.
var plainServer = script{
	{"", "$ BAD not in the script\r\n"},
	{"AUTHENTICATE PLAIN", "$ OK [" + capabilities + "] in\r\n"},
	{"NAMESPACE", "* NAMESPACE ((\"\" \"/\")) NIL NIL\r\n$ OK done\r\n"},
	{"LIST \"\"", "* LIST () \"/\" INBOX\r\n$ OK done\r\n"},
	{"LIST (SUBSCRIBED)", "$ OK done\r\n"},
	{"STATUS", "* STATUS INBOX (MESSAGES 1 UIDNEXT 2 UIDVALIDITY 7)\r\n$ OK done\r\n"},
	{"EXAMINE", "* 1 EXISTS\r\n* FLAGS (\\Seen)\r\n* OK [UIDVALIDITY 7] x\r\n* OK [UIDNEXT 2] x\r\n$ OK [READ-ONLY] done\r\n"},
	{"FETCH", "* 1 FETCH (UID 1 FLAGS (\\Seen))\r\n$ OK done\r\n"},
	{"LOGOUT", "* BYE\r\n$ OK done\r\n"},
}

// but is the script with other answers in the place of some.
func (s script) but(more ...[2]string) script { return append(s[:len(s):len(s)], more...) }

// with is the script of a server that can do more.
func (s script) with(more string) script {
	return s.but([2]string{"AUTHENTICATE PLAIN", "$ OK [" + capabilities + " " + more + "] in\r\n"})
}

// serve runs the script for every connection until the test ends.
func (s script) serve(t *testing.T) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go s.converse(conn)
		}
	}()
	return l.Addr().String()
}

func (s script) converse(conn net.Conn) {
	defer conn.Close()
	io.WriteString(conn, "* OK ["+capabilities+"] hello\r\n")
	r := bufio.NewReader(conn)
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return
		}
		tag, command, _ := strings.Cut(strings.TrimSpace(line), " ")
		answer := ""
		for _, a := range s {
			if strings.HasPrefix(command, a[0]) {
				answer = a[1]
			}
		}
		if answer == "" {
			return
		}
		io.WriteString(conn, strings.ReplaceAll(answer, "$", tag))
	}
}

// compareServers compares one user of two scripted servers, and returns the
// differences, then "!" and the error.
func compareServers(t *testing.T, from, to script) string {
	t.Helper()
	c, a, b := members(from.serve(t), Options{Timeout: 20 * time.Second})
	b.Addresses = map[string]string{"imap": to.serve(t)}
	report, err := c.Compare(t.Context(), a, b, []string{"u"})
	var words []string
	for _, d := range report.Differences {
		words = append(words, fmt.Sprintf("%s %s: %q, %q", d.Mailbox, d.What, d.From, d.To))
	}
	if err != nil {
		words = append(words, "! "+err.Error())
		if report.Equal != 0 {
			t.Errorf("equal in spite of %v", err)
		}
	}
	return strings.Join(words, "\n")
}

// TestServers: what two servers say in different words is equal; what they do
// not say is never equal.
func TestServers(t *testing.T) {
	listed := func(lines string) [2]string { return [2]string{"LIST \"\"", lines + "$ OK done\r\n"} }
	status := func(mailbox, items string) [2]string {
		return [2]string{"STATUS " + mailbox + " ", "* STATUS " + mailbox + " (" + items + ")\r\n$ OK done\r\n"}
	}
	const one = "MESSAGES 1 UIDNEXT 2 UIDVALIDITY 7"
	cyrus := func(items string) script {
		return plainServer.with("CONDSTORE ID").but([2]string{"ID", "* ID (\"name\" \"Cyrus IMAPD\")\r\n$ OK done\r\n"}, status("INBOX", items))
	}
	acl := func(answer string) script { return plainServer.with("ACL").but([2]string{"GETACL", answer}) }
	for name, test := range map[string]struct {
		from, to script
		want     string
	}{
		"the same": {plainServer, plainServer, ""},
		"a name as literal": {
			plainServer.but(listed("* LIST () \"/\" INBOX\r\n* LIST () \"/\" \"su mmer\"\r\n"), status(`"su mmer"`, one)),
			plainServer.but(listed("* LIST (\\HasNoChildren) \"/\" {7}\r\nsu mmer\r\n* LIST () \"/\" \"INBOX\"\r\n"),
				[2]string{`STATUS "su mmer"`, "* STATUS {7}\r\nsu mmer (UIDNEXT 2 UIDVALIDITY 7 MESSAGES 1)\r\n$ OK done\r\n"}), ""},
		"a name in modified UTF-7": {
			plainServer.but(listed("* LIST () \"/\" INBOX\r\n* LIST () \"/\" &ZeVnLIqe-\r\n"), status(`"&ZeVnLIqe-"`, one)),
			plainServer, "日本語 mailbox: \"exists\", \"\""},
		"another delimiter": {
			plainServer.but(listed("* LIST () \"/\" INBOX\r\n* LIST () \"/\" x/y\r\n"), status(`"x/y"`, one)),
			plainServer.but(listed("* LIST () \".\" INBOX\r\n* LIST () \".\" x.y\r\n"), status(`"x.y"`, one)),
			"x.y mailbox: \"\", \"exists\"\nx/y mailbox: \"exists\", \"\""},
		"others' mailboxes": {
			plainServer.but([2]string{"NAMESPACE", "* NAMESPACE ((\"\" \"/\")) ((\"user/\" \"/\")) NIL\r\n$ OK done\r\n"},
				listed("* LIST () \"/\" INBOX\r\n* LIST (\\Noselect) \"/\" user\r\n* LIST () \"/\" user/v\r\n")),
			plainServer, ""},
		"a subscription": {
			plainServer.but([2]string{"LIST (SUBSCRIBED)", "* LIST (\\Subscribed \\NonExistent) \"/\" gone\r\n$ OK done\r\n"}),
			plainServer, "gone subscription: \"subscribed\", \"\""},
		"a mailbox that cannot be selected": {
			plainServer.but(listed("* LIST () \"/\" INBOX\r\n* LIST (\\Noselect \\HasChildren) \"/\" x\r\n")),
			plainServer, "x mailbox: \"exists \\\\noselect\", \"\""},
		"another UIDNEXT": {plainServer, plainServer.but(status("INBOX", "MESSAGES 1 UIDNEXT 3 UIDVALIDITY 7")),
			"INBOX status: \"1 messages, UIDNEXT 2, UIDVALIDITY 7\", \"1 messages, UIDNEXT 3, UIDVALIDITY 7\""},
		"other flags": {plainServer, plainServer.but([2]string{"FETCH", "* 1 FETCH (FLAGS () UID 1)\r\n$ OK done\r\n"}),
			"INBOX flags: \"UID 1 (\\\\seen)\", \"UID 1 ()\""},
		"HIGHESTMODSEQ in the place of flags": {cyrus(one + " HIGHESTMODSEQ 5"), cyrus(one + " HIGHESTMODSEQ 5").but([2]string{"FETCH", ""}), ""},
		"another HIGHESTMODSEQ": {cyrus(one + " HIGHESTMODSEQ 5"), cyrus(one + " HIGHESTMODSEQ 6"),
			"INBOX status: \"1 messages, UIDNEXT 2, UIDVALIDITY 7, HIGHESTMODSEQ 5\", \"1 messages, UIDNEXT 2, UIDVALIDITY 7, HIGHESTMODSEQ 6\""},
		"HIGHESTMODSEQ is missing":                 {cyrus(one), cyrus(one), "! u: STATUS \"INBOX\": the answer lacks what was asked for\nSTATUS \"INBOX\": the answer lacks what was asked for"},
		"HIGHESTMODSEQ on one only: flags instead": {cyrus(one + " HIGHESTMODSEQ 5"), plainServer, ""},
		"no answer to STATUS but OK":               {plainServer, plainServer.but([2]string{"STATUS", "$ OK done\r\n"}), "! u: STATUS \"INBOX\": the answer lacks what was asked for"},
		"NO to STATUS":                             {plainServer, plainServer.but([2]string{"STATUS", "$ NO not now\r\n"}), "! u: STATUS \"INBOX\": imap: NO not now"},
		"NO to LIST":                               {plainServer, plainServer.but([2]string{"LIST", "$ NO not now\r\n"}), "! u: LIST: imap: NO not now"},
		"messages that are not shown": {plainServer.but([2]string{"FETCH", "$ OK done\r\n"}), plainServer.but([2]string{"FETCH", "$ OK done\r\n"}),
			"! u: mailbox \"INBOX\": both members have shown 0 of the messages 1 to 1"},
		"as many messages as can be": {
			plainServer.but(status("INBOX", "MESSAGES 4294967295 UIDNEXT 2 UIDVALIDITY 7")), plainServer.but(status("INBOX", "MESSAGES 4294967295 UIDNEXT 2 UIDVALIDITY 7")),
			"! u: mailbox \"INBOX\": both members have shown 1 of the messages 1 to 5000"},
		"no right to see the ACL, on both": {acl("$ NO Permission denied\r\n"), acl("$ NO Permission denied\r\n"), ""},
		"an ACL on one":                    {acl("* ACL INBOX u lr\r\n$ OK done\r\n"), acl("* ACL INBOX\r\n$ OK done\r\n"), "INBOX ACL: \"\\\"u\\\" lr\", \"\""},
		"GETACL is unavailable":            {acl("$ NO [UNAVAILABLE] later\r\n"), acl("$ NO [UNAVAILABLE] later\r\n"), "! u: GETACL \"INBOX\": imap: NO [UNAVAILABLE] later\nGETACL \"INBOX\": imap: NO [UNAVAILABLE] later"},
		"only one lets the user in": {plainServer, plainServer.but([2]string{"AUTHENTICATE", "$ NO [AUTHORIZATIONFAILED] no such user\r\n"}),
			" login: \"accepted\", \"refused\""},
		"NO for a reason that says nothing of the user": {plainServer, plainServer.but([2]string{"AUTHENTICATE", "$ NO [UNAVAILABLE] later\r\n"}),
			"! u: log in to backend b: imap: NO [UNAVAILABLE] later"},
		"no LIST-EXTENDED": {plainServer, plainServer.but([2]string{"AUTHENTICATE PLAIN", "$ OK [CAPABILITY IMAP4rev1] in\r\n"}),
			"! u: log in to backend b: the server has no LIST-EXTENDED: subscriptions cannot be compared"},
		"a server that hangs up": {plainServer, plainServer.but([2]string{"STATUS", ""}), "! u: STATUS \"INBOX\": unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := compareServers(t, test.from, test.to); got != test.want {
				t.Errorf("got\n%s\nwant\n%s", got, test.want)
			}
		})
	}
}

// TestReplicaAddress: the address for reading is taken where somebody listens,
// and the ordinary one where nobody does; scripts are looked for on the same.
func TestReplicaAddress(t *testing.T) {
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	address := plainServer.serve(t)
	c, a, b := members(address, Options{})
	// a is still the master, b a replica whose ordinary services are shut.
	a.Addresses = map[string]string{"imap": address, "sieve": nobody.Addr().String(), IMAPService: nobody.Addr().String()}
	b.Addresses = map[string]string{"imap": nobody.Addr().String(), "sieve": nobody.Addr().String(), IMAPService: address}
	report, err := c.Compare(t.Context(), a, b, []string{"u", "v"})
	if err != nil || report.Err() != nil || report.String() != "users compared: 2 equal, 0 not; not compared: ACLs, quota, sieve scripts" {
		t.Errorf("%v, %v, %v", report, report.Err(), err)
	}
	for _, m := range []*backendpool.Backend{a, b} {
		m.Addresses["imap"] = nobody.Addr().String()
	}
	if _, err := c.Compare(t.Context(), a, b, []string{"u"}); err == nil || !strings.Contains(err.Error(), "connect to backend a") {
		t.Errorf("nobody listens on a: %v", err)
	}
}
