package proxy

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/emersion/go-smtp"
)

// said is the code of an error as it goes out; "" for none.
func said(err *smtp.SMTPError) string {
	if err == nil {
		return ""
	}
	code, _, _ := strings.Cut(strings.Join(replyTo(err).lines, ""), " ")
	return strings.TrimSpace(string(newReply(err.Code).append(nil))) + " " + code
}

func TestLMTPCommand(t *testing.T) {
	tests := []struct{ line, verb, arg string }{
		{"RSET", "RSET", ""},
		{"rcpt to:<a@b>  ", "RCPT", "to:<a@b>"},
		{"MAIL   FROM:<>", "MAIL", "FROM:<>"},
		{"", "", ""},
		{"R\u017fET", "R\u017fET", ""}, // no S by any backend's reading
		{"NOOP\x00", "NOOP\x00", ""},
	}
	for _, test := range tests {
		if verb, arg := lmtpCommand([]byte(test.line)); verb != test.verb || arg != test.arg {
			t.Errorf("%q: %q %q", test.line, verb, arg)
		}
	}
}

func TestLMTPHelloName(t *testing.T) {
	for _, name := range []string{"mx1.example.org", "my_host", "[192.0.2.1]", "[IPv6:2001:db8::1]", "bücher.example"} {
		if got, err := helloName(name); got != name || err != nil {
			t.Errorf("%q: %q, %v", name, got, err)
		}
	}
	for _, name := range []string{"", "a b", "a\x00", "a)\tb", "[", "[]", "a\xff", "<a>", "a;b", strings.Repeat("a", 256)} {
		if _, err := helloName(name); said(err) != "501 5.5.4" {
			t.Errorf("%q: %v", name, err)
		}
	}
}

// What an MTA may write, and what a backend then gets to see.
func TestLMTPForwardPath(t *testing.T) {
	tests := []struct {
		arg           string
		local, domain string
		wire          string
	}{
		{"TO:<alice@Example.ORG>", "alice", "example.org", "alice@example.org"},
		{"to: <Alice@example.org>", "Alice", "example.org", "Alice@example.org"},
		{"TO:<alice+lists.go@example.org>", "alice+lists.go", "example.org", "alice+lists.go@example.org"},
		{"TO:<postmaster>", "postmaster", "", "postmaster"},
		{"TO:<Postmaster>", "Postmaster", "", "Postmaster"},
		{"TO:<u0001>", "u0001", "", "u0001"},
		{"TO:<@a.example,@[192.0.2.1],@b.example:alice@example.org>", "alice", "example.org", "alice@example.org"},

		// The quotes that an address does not need go, the others stay.
		{`TO:<"alice"@example.org>`, "alice", "example.org", "alice@example.org"},
		{`TO:<"\a\l\i\c\e"@example.org>`, "alice", "example.org", "alice@example.org"},
		{`TO:<"alice smith"@example.org>`, "alice smith", "example.org", `"alice smith"@example.org`},
		{`TO:<"a\"b\\c"@example.org>`, `a"b\c`, "example.org", `"a\"b\\c"@example.org`},
		{`TO:<"a@b"@example.org>`, "a@b", "example.org", `"a@b"@example.org`},
		{`TO:<"a>b"@example.org>`, "a>b", "example.org", `"a>b"@example.org`},
		{`TO:<"victim@x> ORCPT=rfc822;a"@y>`, "victim@x> ORCPT=rfc822;a", "y", `"victim@x> ORCPT=rfc822;a"@y`},
		{"TO:<.a@docomo.example>", ".a", "docomo.example", `".a"@docomo.example`},
		{"TO:<a..b@docomo.example>", "a..b", "docomo.example", `"a..b"@docomo.example`},
		{`TO:<a..b.@docomo.example>`, "a..b.", "docomo.example", `"a..b."@docomo.example`},

		{"TO:<alice@[192.0.2.1]>", "alice", "[192.0.2.1]", "alice@[192.0.2.1]"},
		{"TO:<alice@[ipv6:2001:DB8:0::1]>", "alice", "[IPv6:2001:db8::1]", "alice@[IPv6:2001:db8::1]"},
		{"TO:<jürgen@BÜCHER.example>", "jürgen", "bücher.example", "jürgen@bücher.example"},
		{"TO:<a@\u212Aelvin.example>", "a", "\u212Aelvin.example", "a@\u212Aelvin.example"}, // no k
		{"TO:<a@my_host>", "a", "my_host", "a@my_host"},
	}
	for _, test := range tests {
		m, params, err := parseForward(test.arg)
		if err != nil || len(params) > 0 || m != (mailbox{test.local, test.domain}) || m.String() != test.wire {
			t.Errorf("%s: %+v %q, %v %v", test.arg, m, m, params, err)
		}
		if want := strings.ContainsFunc(test.wire, func(c rune) bool { return c > 127 }); m.isUTF8() != want {
			t.Errorf("%s: needs SMTPUTF8 %v, want %v", test.arg, m.isUTF8(), want)
		}
	}
}

func TestLMTPBadForwardPath(t *testing.T) {
	tests := []struct{ arg, want string }{
		{"", "501 5.5.2"},
		{"FROM:<a@b>", "501 5.5.2"},
		{"TO <a@b>", "501 5.5.2"},
		{"TO:a@b", "501 5.5.2"},
		{"TO:", "501 5.5.2"},
		{"TO:<>", "501 5.1.3"},
		{"TO:<", "501 5.1.3"},
		{"TO:<a", "501 5.1.3"},
		{"TO:<a@>", "501 5.1.3"},
		{"TO:<@b>", "501 5.1.3"},
		{"TO:<@b:>", "501 5.1.3"},
		{"TO:<@>", "501 5.1.3"},
		{"TO:<@a,b:c@d>", "501 5.1.3"},
		{"TO:<a@b", "501 5.1.3"},
		{"TO:<a@b@c>", "501 5.1.3"},
		{"TO:<a b@c>", "501 5.1.3"},
		{"TO:<<a@b>>", "501 5.1.3"},
		{`TO:<a\@b@c>`, "501 5.1.3"},
		{`TO:<"a@c>`, "501 5.1.3"},
		{`TO:<"a\`, "501 5.1.3"},
		{`TO:<"a"b@c>`, "501 5.1.3"},
		{`TO:<""@c>`, "501 5.1.3"}, // a catch-all for a directory
		{`TO:<"">`, "501 5.1.3"},
		{"TO:<a@.b>", "501 5.1.3"},
		{"TO:<a@b..c>", "501 5.1.3"},
		{"TO:<a@b.>", "501 5.1.3"},
		{"TO:<a@b;c>", "501 5.1.3"},
		{"TO:<a@[1.2.3]>", "501 5.1.3"},
		{"TO:<a@[1.2.3.4>", "501 5.1.3"},
		{"TO:<a@[2001:db8::1]>", "501 5.1.3"},
		{"TO:<a@[IPv6:1.2.3.4]>", "501 5.1.3"},
		{"TO:<a@[IPv6:fe80::1%eth0]>", "501 5.1.3"},
		{"TO:<a\x00@b>", "501 5.1.3"},
		{"TO:<\"a\tb\"@c>", "501 5.1.3"},
		{"TO:<\"a\\\x00b\"@c>", "501 5.1.3"},
		{"TO:<a\x7f@b>", "501 5.1.3"},
		{"TO:<\"a\u0085b\"@c>", "501 5.1.3"},
		{"TO:<a\xff@b>", "501 5.1.3"},
		{"TO:<a@b\u00a0c>", "501 5.1.3"},
		{"TO:<" + strings.Repeat("a", 256) + "@b>", "501 5.1.3"},
		{"TO:<a@" + strings.Repeat("b", 256) + ">", "501 5.1.3"},
		{"TO:<@" + strings.Repeat("c", 250) + ":" + strings.Repeat("a", 250) + "@" + strings.Repeat("b", 250) + ">", "501 5.1.3"},
		{"TO:<." + strings.Repeat("a", 254) + "@" + strings.Repeat("b", 254) + ">", "501 5.1.3"}, // too long with its quotes
		{"TO:<a@b>x", "501 5.5.4"},
		{"TO:<a@b>NOTIFY=NEVER", "501 5.5.4"},
		{"TO:<a@b> notify=NEVER Notify=NEVER", "501 5.5.4"},
		{"TO:<a@b> =x", "501 5.5.4"},
		{"TO:<a@b> A=", "501 5.5.4"},
		{"TO:<a@b> A=b=c", "501 5.5.4"},
		{"TO:<a@b> -A", "501 5.5.4"},
		{"TO:<a@b> <c@d>", "501 5.5.4"},
		{"TO:<a@b>" + strings.Repeat(" X", 2), "501 5.5.4"},
		{"TO:<a@b> A B C D E F G H I J K L M N O P Q", "501 5.5.4"},
	}
	for _, test := range tests {
		if m, params, err := parseForward(test.arg); said(err) != test.want {
			t.Errorf("%q: %+v %v, %q, want %s", test.arg, m, params, said(err), test.want)
		}
	}
}

func TestLMTPReversePath(t *testing.T) {
	m, params, err := parseReverse("from:<> BODY=8BITMIME  size=12 SMTPUTF8")
	want := []param{{"BODY", "8BITMIME", true}, {"SIZE", "12", true}, {"SMTPUTF8", "", false}}
	if !m.isNull() || m.String() != "" || !slices.Equal(params, want) || err != nil {
		t.Errorf("%+v %v %v", m, params, err)
	}
	if m, _, err := parseReverse("FROM:<root>"); m != (mailbox{local: "root"}) || err != nil {
		t.Errorf("cron: %+v %v", m, err)
	}
	for _, arg := range []string{"FROM:<a@b@c>", "FROM:<a\x00@b>", "FROM:<a\xff@b>"} {
		if _, _, err := parseReverse(arg); said(err) != "501 5.1.7" {
			t.Errorf("%q: %v", arg, err)
		}
	}
}

// Each command is what an MTA sends to us who announce everything, then what
// goes to a backend that offers everything, and to one that offers nothing.
func TestLMTPParameters(t *testing.T) {
	all := announced{smtputf8: true, dsn: true, ignoreQuota: true}
	parse := func(command string, a announced) (func(func(string) bool) string, *smtp.SMTPError) {
		verb, arg := lmtpCommand([]byte(command))
		if verb == "MAIL" {
			_, params, err := parseReverse(arg)
			if err != nil {
				return nil, err
			}
			p, err := parseMailParams(params, a)
			return func(has func(string) bool) string { return string(p.write(nil, has)) }, err
		}
		_, params, err := parseForward(arg)
		if err != nil {
			return nil, err
		}
		p, err := parseRcptParams(params, a)
		return func(has func(string) bool) string { return string(p.write(nil, has)) }, err
	}
	tests := []struct{ command, wire, bad string }{
		{"MAIL FROM:<>", "", ""},
		{"MAIL FROM:<> SIZE=0", " SIZE=0", ""},
		{"MAIL FROM:<> SMTPUTF8 body=8bitmime SIZE=123 ENVID=a+2Bb RET=hdrs AUTH=<>",
			" SIZE=123 BODY=8BITMIME SMTPUTF8 RET=HDRS ENVID=a+2Bb AUTH=<>", ""},
		{"MAIL FROM:<> AUTH=a+3Db@c", " AUTH=a+3Db@c", ""},
		{"MAIL FROM:<> BODY=7BIT", "", ""},
		{"MAIL FROM:<> SIZE=09223372036854775807", " SIZE=9223372036854775807", ""},
		{"MAIL FROM:<> SIZE=9223372036854775808", "", "501 5.5.4"},
		{"MAIL FROM:<> SIZE=000000000000000000001", "", "501 5.5.4"},
		{"MAIL FROM:<> SIZE=-1", "", "501 5.5.4"},
		{"MAIL FROM:<> SIZE", "", "501 5.5.4"},
		{"MAIL FROM:<> BODY=BINARYMIME", "", "555 5.5.4"},
		{"MAIL FROM:<> BODY", "", "555 5.5.4"},
		{"MAIL FROM:<> SMTPUTF8=yes", "", "501 5.5.4"},
		{"MAIL FROM:<> RET=SOME", "", "501 5.5.4"},
		{"MAIL FROM:<> ENVID=" + strings.Repeat("x", 101), "", "501 5.5.4"},
		{"MAIL FROM:<> ENVID=a+0D+0Ab", "", "501 5.5.4"},
		{"MAIL FROM:<> ENVID=a+2bb", "", "501 5.5.4"},
		{"MAIL FROM:<> AUTH", "", "501 5.5.4"},
		{"MAIL FROM:<> ENVID", "", "501 5.5.4"},
		{"MAIL FROM:<> AUTH=a+0Ab", "", "501 5.5.4"},
		{"MAIL FROM:<> HOLDFOR=1", "", "555 5.5.4"},
		{"MAIL FROM:<> NOTIFY=NEVER", "", "555 5.5.4"},

		{"RCPT TO:<a> NOTIFY=success,DELAY ORCPT=RFC822;A+2Bb@c IGNOREQUOTA",
			" NOTIFY=SUCCESS,DELAY ORCPT=rfc822;A+2Bb@c IGNOREQUOTA", ""},
		{"RCPT TO:<a> NOTIFY=NEVER", " NOTIFY=NEVER", ""},
		{"RCPT TO:<a> ORCPT=utf-8;j\u00fcrgen@c", " ORCPT=utf-8;j\u00fcrgen@c", ""},
		{`RCPT TO:<a> ORCPT=utf-8;j\x{FC}rgen\x{2B}a@c`, ` ORCPT=utf-8;j\x{FC}rgen\x{2B}a@c`, ""},
		{"RCPT TO:<a> NOTIFY=NEVER,DELAY", "", "501 5.5.4"},
		{"RCPT TO:<a> NOTIFY=DELAY,DELAY", "", "501 5.5.4"},
		{"RCPT TO:<a> NOTIFY=DELAY,", "", "501 5.5.4"},
		{"RCPT TO:<a> NOTIFY=\u017fUCCESS", "", "501 5.5.4"},
		{"RCPT TO:<a> NOTIFY", "", "501 5.5.4"},
		{"RCPT TO:<a> ORCPT=a@b", "", "501 5.5.4"},
		{"RCPT TO:<a> ORCPT=;a@b", "", "501 5.5.4"},
		{"RCPT TO:<a> ORCPT=rfc822;", "", "501 5.5.4"},
		{"RCPT TO:<a> ORCPT=rfc822;j\u00fcrgen", "", "501 5.5.4"},
		{"RCPT TO:<a> ORCPT=rfc822;a+0D+0ADATA", "", "501 5.5.4"},
		{"RCPT TO:<a> ORCPT=rfc822;" + strings.Repeat("a", 500), "", "501 5.5.4"},
		{`RCPT TO:<a> ORCPT=utf-8;a\x{0A}b`, "", "501 5.5.4"},
		{`RCPT TO:<a> ORCPT=utf-8;a\x{D800}b`, "", "501 5.5.4"},
		{`RCPT TO:<a> ORCPT=utf-8;a\x{0000041}b`, "", "501 5.5.4"},
		{`RCPT TO:<a> ORCPT=utf-8;a\b`, "", "501 5.5.4"},
		{`RCPT TO:<a> ORCPT=utf-8;a\x{41`, "", "501 5.5.4"},
		{"RCPT TO:<a> ORCPT=utf-8;a+2Bb", "", "501 5.5.4"},
		{"RCPT TO:<a> IGNOREQUOTA=1", "", "501 5.5.4"},
		{"RCPT TO:<a> SIZE=1", "", "555 5.5.4"},
	}
	for _, test := range tests {
		write, err := parse(test.command, all)
		if said(err) != test.bad {
			t.Errorf("%s: %q, want %q", test.command, said(err), test.bad)
		}
		if err != nil {
			continue
		}
		if got := write(func(string) bool { return true }); got != test.wire {
			t.Errorf("%s: writes %q, want %q", test.command, got, test.wire)
		}
		if got := write(func(string) bool { return false }); got != "" {
			t.Errorf("%s: writes %q to a backend without extensions", test.command, got)
		}
	}

	// What was not announced is not known.
	for command, want := range map[string]string{
		"MAIL FROM:<> SMTPUTF8": "555 5.5.4", "MAIL FROM:<> RET=FULL": "555 5.5.4", "MAIL FROM:<> ENVID=a": "555 5.5.4",
		"RCPT TO:<a> NOTIFY=NEVER": "555 5.5.4", "RCPT TO:<a> ORCPT=rfc822;a": "555 5.5.4", "RCPT TO:<a> IGNOREQUOTA": "555 5.5.4",
		"MAIL FROM:<> SIZE=1 BODY=8BITMIME AUTH=<>": "",
	} {
		if _, err := parse(command, announced{}); said(err) != want {
			t.Errorf("unannounced: %s: %q, want %q", command, said(err), want)
		}
	}
	if _, err := parse("RCPT TO:<a> ORCPT=utf-8;j\u00fc", announced{dsn: true}); said(err) != "501 5.5.4" {
		t.Errorf("raw UTF-8 without SMTPUTF8: %v", err)
	}

	// A backend without SMTPUTF8 gets the address in ASCII.
	write, _ := parse("RCPT TO:<a> ORCPT=utf-8;j\u00fc@c", all)
	if got := write(func(k string) bool { return k == "DSN" }); got != ` ORCPT=utf-8;j\x{FC}@c` {
		t.Errorf("to a backend without SMTPUTF8: %q", got)
	}
}

func TestXtext(t *testing.T) {
	for _, text := range []string{"", "a", "+=", " \x00\xff\r\n", "a@b"} {
		encoded := encodeXtext(text)
		if got, ok := decodeXtext(encoded); got != text || !ok {
			t.Errorf("%q: %q, %q %v", text, encoded, got, ok)
		}
	}
	if got := encodeXtext("a+b=c\nd"); got != "a+2Bb+3Dc+0Ad" {
		t.Errorf("%q", got)
	}
	for _, bad := range []string{"+", "+2", "+2b", "+G0", "a=b", "a b", "é", "\x7f", "++2B"} {
		if got, ok := decodeXtext(bad); ok {
			t.Errorf("%q: %q", bad, got)
		}
	}
}

// Postfix says who its client is, in two commands; Dovecot hears it.
func TestClientAttributes(t *testing.T) {
	dovecot := strings.Fields("ADDR PORT PROTO HELO LOGIN SESSION TTL TIMEOUT")
	first, err := parseAttributes("NAME=spike.example ADDR=IPV6:2001:db8::1 PORT=4711", xforwardNames)
	if err != nil {
		t.Fatal(err)
	}
	second, err := parseAttributes("proto=esmtp HELO=a+2Bb IDENT=4Xy SOURCE=REMOTE", xforwardNames)
	if err != nil {
		t.Fatal(err)
	}
	c := first.merge(second)
	want := clientAttributes{name: "spike.example", addr: netip.MustParseAddr("2001:db8::1"), port: 4711, proto: "ESMTP",
		helo: "a+b", ttl: -1, set: attrName | attrAddr | attrPort | attrProto | attrHelo}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("%+v", c)
	}
	if got := c.xclient(dovecot); got != "XCLIENT ADDR=IPV6:2001:db8::1 PORT=4711 PROTO=ESMTP HELO=a+2Bb" {
		t.Error(got)
	}
	if got := c.xclient([]string{"NAME", "LOGIN"}); got != "XCLIENT NAME=spike.example" {
		t.Error(got)
	}
	if got := c.xclient([]string{"LOGIN"}); got != "" {
		t.Error(got)
	}

	// Later commands override what they name, with "unavailable" too.
	third, err := parseAttributes("ADDR=::ffff:192.0.2.7 PORT=0 HELO=[unavailable] LOGIN=al+20ice SESSION=x TTL=4 NAME=[TEMPUNAVAIL]", xclientNames)
	if err != nil {
		t.Fatal(err)
	}
	c = c.merge(third)
	if got := c.xclient(append(dovecot, "NAME")); got != "XCLIENT ADDR=192.0.2.7 PROTO=ESMTP LOGIN=al+20ice SESSION=x TTL=4" {
		t.Error(got)
	}
	if got := (clientAttributes{}).xclient(xclientNames); got != "" {
		t.Errorf("nothing known: %q", got)
	}
	unset, err := parseAttributes("TTL=[UNAVAILABLE] ADDR=[UNAVAILABLE] PORT=[UNAVAILABLE] PROTO=LMTPS HELO=\xff", xclientNames)
	if err == nil || unset.ttl != -1 {
		t.Errorf("not xtext: %+v %v", unset, err)
	}
	unset, err = parseAttributes("TTL=[UNAVAILABLE] ADDR=[UNAVAILABLE] PORT=[UNAVAILABLE] PROTO=LMTPS HELO=a+FF", xclientNames)
	if c := c.merge(unset); err != nil || c.ttl != -1 || c.addr.IsValid() || c.port != 0 || c.helo != "a?" {
		t.Errorf("%+v %v", c, err)
	}
	if got := c.merge(unset).xclient(dovecot); got != "XCLIENT HELO=a? LOGIN=al+20ice SESSION=x" {
		t.Error(got) // Dovecot would refuse PROTO=LMTPS
	}
}

func TestBadClientAttributes(t *testing.T) {
	for _, arg := range []string{"", " ", "ADDR", "ADDR=nobody", "ADDR=IPV6:192.0.2.1", "ADDR=fe80::1%eth0", "PORT=65536", "PORT=-1", "PORT=http",
		"TTL=x", "TTL=70000", "HELO=a+0Db", "HELO=a+0d", "HELO=a=b", "HELO=a\x00", "HELO=" + strings.Repeat("x", 256), "=a"} {
		if c, err := parseAttributes(arg, xclientNames); said(err) != "501 5.5.4" {
			t.Errorf("%q: %+v %v", arg, c, err)
		}
	}
	_, err := parseAttributes("LOGIN=alice", xforwardNames)
	if said(err) != "501 5.5.4" || !strings.Contains(err.Message, "LOGIN") {
		t.Errorf("LOGIN in XFORWARD: %v", err)
	}
}

func TestParseBDAT(t *testing.T) {
	tests := []struct {
		arg  string
		n    int64
		last bool
	}{
		{"0", 0, false}, {"12 LAST", 12, true}, {"0 last", 0, true}, {"999999999999999999", 999999999999999999, false},
	}
	for _, test := range tests {
		if n, last, ok := parseBDAT(test.arg); n != test.n || last != test.last || !ok {
			t.Errorf("%q: %d %v %v", test.arg, n, last, ok)
		}
	}
	for _, arg := range []string{"", "LAST", "-1", "+1", "1_0", "0x1", "1 END", "1 LAST x", "1000000000000000000", "1 LA\u017fT", "1LAST"} {
		if n, _, ok := parseBDAT(arg); ok {
			t.Errorf("%q: %d", arg, n)
		}
	}
}

func TestLMTPReply(t *testing.T) {
	tests := []struct {
		reply reply
		want  string
	}{
		{newReply(250, "2.1.5 Ok"), "250 2.1.5 Ok\r\n"},
		{newReply(250, "a", "b", "c"), "250-a\r\n250-b\r\n250 c\r\n"},
		{newReply(250), "250 \r\n"},
		{newReply(550, "5.1.1 no\r\n250 yes"), "550 5.1.1 no250 yes\r\n"},
		{replyTo(errTooManyHops), "554 5.4.6 Too many hops, this is a mail loop\r\n"},
		{replyTo(&smtp.SMTPError{Code: 451, Message: "a\nb"}), "451-4.0.0 a\r\n451 4.0.0 b\r\n"},
		{replyTo(&smtp.SMTPError{Code: 354, EnhancedCode: smtp.NoEnhancedCode, Message: "Go"}), "354 Go\r\n"},
	}
	for _, test := range tests {
		if got := string(test.reply.append(nil)); got != test.want {
			t.Errorf("%q, want %q", got, test.want)
		}
		for line := range strings.SplitSeq(strings.TrimSuffix(test.want, "\r\n"), "\r\n") {
			if code, more, text, ok := parseReplyLine([]byte(line)); !ok || code != test.reply.code || more != (line[3] == '-') || text != line[4:] {
				t.Errorf("%q: %d %v %q %v", line, code, more, text, ok)
			}
		}
	}
	if code, more, text, ok := parseReplyLine([]byte("250")); code != 250 || more || text != "" || !ok {
		t.Errorf("bare code: %d %v %q %v", code, more, text, ok)
	}
	if _, _, text, _ := parseReplyLine([]byte("550 a\x00\tb\xff" + strings.Repeat("x", 600))); !strings.HasPrefix(text, "abx") || len(text) != 500 {
		t.Errorf("%q", text)
	}
	for _, line := range []string{"", "25", "2500 a", "abc", "150 a", "650 a", "2x0 a", "250_a", " 250"} {
		if code, _, _, ok := parseReplyLine([]byte(line)); ok {
			t.Errorf("%q: %d", line, code)
		}
	}
}

// rcptLine reads a RCPT line as a strict server does that shares no code with
// the parser: it returns the path between the brackets, and what follows.
func rcptLine(t *testing.T, line string) (path, params string) {
	t.Helper()
	rest, found := strings.CutPrefix(line, "RCPT TO:<")
	if !found {
		t.Fatalf("%q is no RCPT", line)
	}
	quoted, end := false, -1
	for i := 0; i < len(rest); i++ {
		switch c := rest[i]; {
		case c < ' ' || c == 0x7f:
			t.Fatalf("a control character in %q", line)
		case quoted && c == '\\' && end < 0:
			if i++; i == len(rest) || rest[i] != '"' && rest[i] != '\\' {
				t.Fatalf("a needless backslash in %q", line)
			}
		case c == '"' && end < 0:
			quoted = !quoted
		case quoted:
		case end >= 0: // RFC 3461 allows < and > in xtext
		case c == '<', c == ' ':
			t.Fatalf("%q outside of quotes in %q", c, line)
		case c == '>':
			end = i
		}
	}
	if quoted || end < 0 || end+1 < len(rest) && rest[end+1] != ' ' {
		t.Fatalf("%q does not end its path", line)
	}
	return rest[:end], rest[end+1:]
}

func FuzzLMTPPath(f *testing.F) {
	for _, arg := range []string{"TO:<a@b>", `TO:<"victim@x> ORCPT=rfc822;a"@y>`, `TO:<"a\"\\ b"@[IPv6:::1]> NOTIFY=NEVER`,
		"TO:<@a,@b:c@D> ORCPT=rfc822;a+3Eb IGNOREQUOTA", "TO:<postmaster>", "TO:<é..@\u212A\u023A>", `TO:<a> ORCPT=utf-8;a\x{3E}b`,
		"TO:<a> ORCPT=utf-8;é>", "TO:<a@[::ffff:1.2.3.4]>"} {
		f.Add(arg)
	}
	f.Fuzz(func(t *testing.T, arg string) {
		m, params, err := parseForward(arg)
		if err != nil {
			if err.Code != 501 {
				t.Fatalf("%v", err)
			}
			return
		}
		again, _, err := parseForward("TO:<" + m.String() + ">")
		if err != nil || again != m {
			t.Fatalf("%+v is written %q and read %+v, %v", m, m, again, err)
		}
		p, err := parseRcptParams(params, announced{smtputf8: true, dsn: true, ignoreQuota: true})
		if err != nil {
			return
		}
		line := string(p.write([]byte("RCPT TO:<"+m.String()+">"), func(string) bool { return true }))
		path, rest := rcptLine(t, line)
		if path != m.String() {
			t.Fatalf("%+v: a server reads %q in %q", m, path, line)
		}
		if local := strings.TrimSuffix(path, "@"+m.domain); !strings.HasPrefix(local, `"`) && local != m.local {
			t.Fatalf("%+v: a server reads the local part %q", m, local)
		}
		_, params, err = parseForward("TO:<a>" + rest)
		if err != nil {
			t.Fatalf("%q: %v", rest, err)
		}
		if q, err := parseRcptParams(params, announced{smtputf8: true, dsn: true, ignoreQuota: true}); err != nil || !reflect.DeepEqual(p, q) {
			t.Fatalf("%+v is written %q and read %+v, %v", p, rest, q, err)
		}
	})
}
