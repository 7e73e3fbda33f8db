package proxy

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/posthouse/posthouse/proxy/auth"
)

// A login over STLS, to a backend that wants STLS too (RFC 1939, 2449, 2595,
// 3206, 5034). S and C are we and the client, < and > the backend and we:
//
//	S: +OK mail.example.org ready
//	C: STLS
//	S: +OK Begin TLS negotiation
//	C: USER alice
//	S: +OK
//	C: PASS secret
//	<: +OK [XCLIENT] be1 ready
//	>: STLS
//	<: +OK
//	>: CAPA
//	<: +OK
//	<: SASL PLAIN
//	<: UIDL
//	<: .
//	>: XCLIENT ADDR=192.0.2.77 PORT=4712 SESSION=2WXJ5KQ TTL=6
//	<: +OK Updated
//	>: AUTH PLAIN YWxpY2UAcHJveHkAc2VjcmV0
//	<: +OK Logged in.
//	S: +OK Logged in.

// pop3Dialect is POP3's words (RFC 1939).
type pop3Dialect struct {
	user string // what USER said, until PASS
}

// pop3Shared are the capabilities of the TRANSACTION state that we announce
// before login if every active backend has them.
var pop3Shared = []string{"UIDL", "TOP"}

// capabilities are the lines of CAPA before login (G2, G8).
func (d *pop3Dialect) capabilities(o offer) []string {
	caps := []string{"PIPELINING", "RESP-CODES", "AUTH-RESP-CODE"}
	for _, c := range pop3Shared {
		if slices.Contains(o.shared, c) {
			caps = append(caps, c)
		}
	}
	if o.startTLS {
		caps = append(caps, "STLS")
	}
	if len(o.mechanisms) > 0 {
		caps = append(caps, "USER", "SASL "+strings.Join(o.mechanisms, " "))
	}
	return caps
}

// greet sends the banner. Without a timestamp in it no client tries APOP (RFC
// 1939 §7), which needs the password itself on our side.
func (d *pop3Dialect) greet(c *lineConn, o offer, again bool) error {
	if again {
		return nil
	}
	return c.writeLines("+OK " + o.hostname + " ready")
}

func (d *pop3Dialect) next(c *lineConn, o offer) (request, error) {
	for {
		line, err := c.readLine(maxLine)
		if err != nil {
			return request{}, err
		}
		if done, req, err := d.command(c, o, line); done || err != nil {
			return req, err
		}
	}
}

// cutPOP3Command returns the keyword in upper case and everything behind the
// first space: a password may hold spaces, leading and trailing ones too.
func cutPOP3Command(line []byte) (verb, argument string) {
	verb, argument, _ = strings.Cut(string(line), " ")
	return strings.ToUpper(verb), argument
}

// command handles one command; done says that session.go has to decide.
func (d *pop3Dialect) command(c *lineConn, o offer, line []byte) (done bool, req request, err error) {
	verb, argument := cutPOP3Command(line)
	if strings.IndexByte(argument, 0) >= 0 {
		return false, req, d.bad(c, "NUL in a command")
	}
	switch verb {
	case "CAPA": // RFC 2449 §5
		return false, req, c.writeLines(slices.Concat([]string{"+OK"}, d.capabilities(o), []string{"."})...)
	case "QUIT":
		_ = c.writeLines("+OK Bye")
		return true, req, errClientLeft
	case "STLS": // RFC 2595 §4
		if argument != "" {
			return false, req, d.bad(c, "STLS takes no argument")
		}
		if !o.startTLS {
			return false, req, d.bad(c, "TLS is on already")
		}
		req.startTLS = true
		return true, req, nil
	case "USER":
		if len(o.mechanisms) == 0 {
			// session.go says why not, before a password crosses the wire.
			req.mechanism = "PLAIN"
			return true, req, nil
		}
		if argument == "" {
			return false, req, d.bad(c, "USER takes a name")
		}
		d.user = argument
		return false, req, c.writeLines("+OK") // whether or not there is such a user
	case "PASS":
		if d.user == "" {
			return false, req, d.bad(c, "USER comes first")
		}
		req.mechanism = "PLAIN"
		req.initial = fmt.Appendf(nil, "\x00%s\x00%s", d.user, argument)
		d.user = ""
		return true, req, nil
	case "AUTH":
		return d.auth(c, o, argument)
	}
	return false, req, d.bad(c, "unknown command, or not before the login")
}

// auth is RFC 5034's AUTH. Without an argument it is an old probe for the
// mechanisms.
func (d *pop3Dialect) auth(c *lineConn, o offer, argument string) (done bool, req request, err error) {
	words := strings.Fields(argument)
	switch len(words) {
	case 0:
		return false, req, c.writeLines(slices.Concat([]string{"+OK"}, o.mechanisms, []string{"."})...)
	case 1:
	case 2:
		if req.initial, err = saslInitial([]byte(words[1])); err != nil {
			return false, req, d.bad(c, "the initial response is not base64")
		}
	default:
		return false, req, d.bad(c, "AUTH takes a mechanism and at most an initial response")
	}
	d.user = ""
	req.mechanism = strings.ToUpper(words[0])
	return true, req, nil
}

func (d *pop3Dialect) bad(c *lineConn, why string) error {
	if err := c.strike(); err != nil {
		return err
	}
	return c.writeLines("-ERR " + why)
}

// challenge: the space behind + is there even if nothing follows, or clients
// hang (RFC 5034 §4).
func (d *pop3Dialect) challenge(c *lineConn, text []byte) ([]byte, error) {
	if err := c.writeLines("+ " + base64.StdEncoding.EncodeToString(text)); err != nil {
		return nil, err
	}
	return readSASLResponse(c)
}

func (d *pop3Dialect) proceed(c *lineConn, _ request) error {
	return c.writeLines("+OK Begin TLS negotiation")
}

// pop3Answers are the answers to a refusal (RFC 2449 §8, RFC 3206). [AUTH]
// makes clients ask for the password again; what bears no code is, by
// AUTH-RESP-CODE, not about credentials.
var pop3Answers = map[Reason]string{
	Unavailable:      "-ERR [SYS/TEMP] Account is temporarily unavailable.",
	Misconfigured:    "-ERR [SYS/TEMP] Account is temporarily unavailable.",
	RoleDisagreement: "-ERR [SYS/TEMP] Account is temporarily unavailable.",
	WrongCredentials: "-ERR [AUTH] Authentication failed.",
	NotAuthorized:    "-ERR [AUTH] Not authorized to act as this user.",
	PrivacyRequired:  "-ERR Use STLS first.",
	TooMany:          "-ERR Too many failures.",
	TooLong:          "-ERR The command is too long.",
	Cancelled:        "-ERR Authentication cancelled.",
	Malformed:        "-ERR Malformed authentication response.",
	UnknownMechanism: "-ERR Unsupported authentication mechanism.",
	Pipelined:        "-ERR STLS cannot be pipelined.",
	InUse:            "-ERR [IN-USE] The mailbox is in use.",
	LoginDelay:       "-ERR [LOGIN-DELAY] Too many logins, try again later.",
	ShuttingDown:     "-ERR [SYS/TEMP] This frontend is being restarted, try again.",
	TimedOut:         "-ERR [SYS/TEMP] No login in time.",
	Overloaded:       "-ERR [SYS/TEMP] Too many connections.",
}

func (d *pop3Dialect) refuse(c *lineConn, _ request, why Reason) error {
	return c.writeLines(pop3Answers[why])
}

func (d *pop3Dialect) admit(c *lineConn, _ request, w welcome) error {
	text := w.text
	if text == "" {
		text = "Logged in."
	}
	return c.writeLines("+OK " + text)
}

func (d *pop3Dialect) partingWords() string { return "QUIT" }

// xclient is the token for "[XCLIENT]" in a backend's banner: it believes what
// we say of the client.
const xclient = "XCLIENT"

func (d *pop3Dialect) meet(b *lineConn) ([]string, error) {
	banner, err := readPOP3Answer(b)
	if err != nil {
		return nil, err
	}
	if banner.status != "+OK" {
		return nil, failf(Unavailable, "greeting", "no POP3 banner: %q", clip(banner.line))
	}
	if b.mustStartTLS {
		answer, err := d.ask(b, "STLS")
		if err != nil {
			return nil, err
		}
		if answer.status != "+OK" {
			return nil, failf(Misconfigured, "STLS", "the backend refuses TLS: %q", clip(answer.line))
		}
		if err := b.startTLS(); err != nil {
			return nil, err
		}
	}
	caps, err := d.capa(b)
	if err != nil {
		return nil, err
	}
	if banner.code == xclient {
		// The banner does not come again after STLS. A forged one makes us
		// ask for something that will be refused, no more.
		caps = append(caps, xclient)
	}
	return caps, nil
}

// mostCapabilities bounds the lines of a backend's capability list.
const mostCapabilities = 100

// capa asks for the capabilities, one a line in upper case. A backend that
// does not know CAPA has none.
func (d *pop3Dialect) capa(b *lineConn) ([]string, error) {
	answer, err := d.ask(b, "CAPA")
	if err != nil || answer.status != "+OK" {
		return nil, err
	}
	var caps []string
	for range mostCapabilities {
		line, err := b.readLine(maxLine)
		if err != nil {
			return nil, err
		}
		if string(line) == "." {
			return caps, nil
		}
		caps = append(caps, strings.ToUpper(strings.Join(strings.Fields(string(line)), " ")))
	}
	return nil, failf(Unavailable, "CAPA", "more than %d capabilities", mostCapabilities)
}

func (d *pop3Dialect) ask(b *lineConn, command string) (pop3Answer, error) {
	if err := b.writeLines(command); err != nil {
		return pop3Answer{}, err
	}
	return readPOP3Answer(b)
}

func (d *pop3Dialect) logIn(b *lineConn, announced []string, as auth.Credentials, from origin) (welcome, error) {
	if !slices.ContainsFunc(announced, offersPOP3Plain) {
		return welcome{}, failf(Misconfigured, "AUTH",
			"the backend offers no SASL PLAIN: allow it there, or set tls.mode to what it demands")
	}
	if words := from.xclient(); words != "" && slices.Contains(announced, xclient) {
		// A refusal only means that its logs show our address.
		if _, err := d.ask(b, words); err != nil {
			return welcome{}, err
		}
	}
	answer, err := d.authenticate(b, base64.StdEncoding.EncodeToString(plainMessage(as)))
	if err != nil {
		return welcome{}, err
	}
	if answer.status != "+OK" {
		b.claimed = false
		return welcome{}, pop3Refusal(answer, slices.Contains(announced, "AUTH-RESP-CODE"))
	}
	if !b.claimed {
		return welcome{}, failf(Misconfigured, "AUTH", "the backend lets in without credentials: %q", clip(answer.line))
	}
	return welcome{text: printable(answer.text)}, nil
}

func offersPOP3Plain(line string) bool {
	words := strings.Fields(line)
	return len(words) > 1 && words[0] == "SASL" && slices.Contains(words[1:], "PLAIN")
}

// pop3CommandMax is the longest command, with its CRLF, that a backend must
// take (RFC 2449 §4). A longer initial response waits for the continuation
// (RFC 5034 §4).
const pop3CommandMax = 255

// authenticate sends the message of PLAIN and returns the +OK or -ERR.
func (d *pop3Dialect) authenticate(b *lineConn, message string) (pop3Answer, error) {
	command := "AUTH PLAIN " + message
	if len(command)+2 <= pop3CommandMax {
		b.claimed = true
		return d.final(d.ask(b, command))
	}
	answer, err := d.ask(b, "AUTH PLAIN")
	if err != nil || answer.status != "+" {
		return d.final(answer, err)
	}
	b.claimed = true
	return d.final(d.ask(b, message))
}

// final refuses an answer that is neither +OK nor -ERR.
func (d *pop3Dialect) final(answer pop3Answer, err error) (pop3Answer, error) {
	if err == nil && answer.status != "+OK" && answer.status != "-ERR" {
		err = failf(Unavailable, "AUTH", "the backend answers what nobody asked: %q", clip(answer.line))
	}
	return answer, err
}

// pop3Refusal gives a backend's refusal its reason; coded says that it marks
// every failure of credentials by [AUTH] (RFC 3206 §6). Its words never reach
// the client.
func pop3Refusal(answer pop3Answer, coded bool) error {
	reason := Unavailable
	switch answer.code {
	case "AUTH":
		if !soundsTemporary(answer.text) {
			reason = WrongCredentials
		}
	case "":
		if !coded {
			reason = WrongCredentials
		}
	case "IN-USE":
		reason = InUse
	case "LOGIN-DELAY":
		reason = LoginDelay
	}
	return failf(reason, "AUTH", "the backend refuses: %q", clip(answer.line))
}

// pop3Answer is one status line of a backend.
type pop3Answer struct {
	status string // +OK, -ERR or +, in upper case
	code   string // what stood in brackets, in upper case
	text   string // what follows
	line   []byte // as it came
}

func readPOP3Answer(b *lineConn) (pop3Answer, error) {
	line, err := b.readLine(maxLine)
	if err != nil {
		return pop3Answer{}, err
	}
	return parsePOP3Answer(line), nil
}

func parsePOP3Answer(line []byte) pop3Answer {
	status, rest, _ := bytes.Cut(line, []byte(" "))
	a := pop3Answer{status: strings.ToUpper(string(status)), text: string(rest), line: line}
	if len(rest) > 0 && rest[0] == '[' {
		if code, text, found := strings.Cut(a.text[1:], "]"); found {
			a.code, a.text = strings.ToUpper(code), strings.TrimPrefix(text, " ")
		}
	}
	return a
}

// xclient tells a backend that trusts us who the client is (Dovecot's XCLIENT,
// for POP3 and ManageSieve); empty if we do not know.
func (o origin) xclient() string {
	if !o.client.IsValid() {
		return ""
	}
	return "XCLIENT ADDR=" + o.client.Addr().WithZone("").String() + " PORT=" + strconv.Itoa(int(o.client.Port())) +
		" SESSION=" + o.session + " TTL=" + proxyTTL
}
