package proxy

import (
	"encoding/base64"
	"slices"
	"strconv"
	"strings"

	"github.com/posthouse/posthouse/proxy/auth"
)

// A login over STARTTLS, to a backend that wants STARTTLS too (RFC 5804). S and
// C are we and the client, < and > the backend and we:
//
//	S: "IMPLEMENTATION" "posthouse"
//	S: "SIEVE" "fileinto vacation"
//	S: "SASL" ""
//	S: "STARTTLS"
//	S: "VERSION" "1.0"
//	S: OK "mail.example.org ready"
//	C: STARTTLS
//	S: OK "Begin TLS negotiation now."
//	S: "IMPLEMENTATION" "posthouse"          after the handshake, unasked
//	S: "SIEVE" "fileinto vacation"
//	S: "SASL" "PLAIN LOGIN"
//	S: "VERSION" "1.0"
//	S: OK "mail.example.org ready"
//	C: AUTHENTICATE "PLAIN" "AGFsaWNlAHNlY3JldA=="
//	<: "IMPLEMENTATION" "be1" … OK
//	>: STARTTLS
//	<: OK
//	<: "IMPLEMENTATION" "be1" … OK           after the handshake, unasked
//	>: XCLIENT ADDR=192.0.2.77 PORT=4712 SESSION=2WXJ5KQ TTL=6
//	<: OK "Updated"
//	>: AUTHENTICATE "PLAIN" "YWxpY2UAcHJveHkAc2VjcmV0"
//	<: OK "Logged in."
//	S: OK "Logged in."

// sieveDialect is ManageSieve's words (RFC 5804).
type sieveDialect struct {
	announce []string // configured words of SIEVE; empty: what the backends share
}

// sieveShared are the capabilities whose words are announced before login as
// far as every active backend has them. SIEVE must be there (RFC 5804 §1.7).
var sieveShared = []string{"NOTIFY", "EXTLISTS"}

// capabilities are the lines of the capability response before login (G2, G8).
func (d *sieveDialect) capabilities(o offer) []string {
	extensions := d.announce
	if len(extensions) == 0 {
		extensions = sieveWords(o.shared, "SIEVE")
	}
	caps := []string{`"IMPLEMENTATION" "posthouse"`, sieveCapability("SIEVE", extensions)}
	for _, key := range sieveShared {
		if words := sieveWords(o.shared, key); len(words) > 0 {
			caps = append(caps, sieveCapability(key, words))
		}
	}
	caps = append(caps, sieveCapability("SASL", o.mechanisms))
	if o.startTLS {
		caps = append(caps, `"STARTTLS"`)
	}
	return append(caps, `"VERSION" "1.0"`)
}

func sieveCapability(key string, words []string) string {
	return `"` + key + `" ` + sieveText([]byte(strings.Join(words, " ")), "")
}

// sieveWords collects the words of key from tokens "KEY word".
func sieveWords(tokens []string, key string) (words []string) {
	for _, token := range tokens {
		if word, found := strings.CutPrefix(token, key+" "); found {
			words = append(words, word)
		}
	}
	return words
}

// greet sends the capabilities at the start, and again after STARTTLS (RFC
// 5804 §2.2): clients wait for them.
func (d *sieveDialect) greet(c *lineConn, o offer, _ bool) error {
	return c.writeLines(append(d.capabilities(o), "OK "+sieveText([]byte(o.hostname+" ready"), ""))...)
}

func (d *sieveDialect) next(c *lineConn, o offer) (request, error) {
	for {
		line, err := readSieveLine(c)
		if err != nil {
			return request{}, err
		}
		if done, req, err := d.command(c, o, line); done || err != nil {
			return req, err
		}
	}
}

// command handles one command; done says that session.go has to decide.
func (d *sieveDialect) command(c *lineConn, o offer, line sieveLine) (done bool, req request, err error) {
	switch {
	case line.fault != "":
		return false, req, d.bad(c, line.fault)
	case len(line.items) == 0 || line.items[0].kind != sieveAtom:
		return false, req, d.bad(c, "missing command")
	}
	args, ok := line.strings()
	if !ok {
		return false, req, d.bad(c, "arguments are strings")
	}
	verb := strings.ToUpper(string(line.items[0].text))
	switch verb {
	case "CAPABILITY", "LOGOUT", "STARTTLS":
		if len(args) > 0 {
			return false, req, d.bad(c, verb+" takes no argument")
		}
	}
	switch verb {
	case "CAPABILITY":
		return false, req, c.writeLines(append(d.capabilities(o), `OK "Capability completed."`)...)
	case "NOOP": // RFC 5804 §2.13
		switch len(args) {
		case 0:
			return false, req, c.writeLines(`OK "NOOP completed."`)
		case 1:
			return false, req, c.writeLines("OK (TAG " + sieveText(args[0], "") + `) "Done."`)
		}
		return false, req, d.bad(c, "NOOP takes at most a tag")
	case "LOGOUT":
		_ = c.writeLines(`OK "Logging out."`)
		return true, req, errClientLeft
	case "STARTTLS":
		if !o.startTLS {
			return false, req, d.bad(c, "TLS is on already")
		}
		req.startTLS = true
		return true, req, nil
	case "AUTHENTICATE":
		if len(args) == 0 || len(args) > 2 {
			return false, req, d.bad(c, "AUTHENTICATE takes a mechanism and at most an initial response")
		}
		req.mechanism = strings.ToUpper(string(args[0]))
		if len(args) == 2 {
			if req.initial, err = sieveInitial(args[1]); err != nil {
				return false, req, d.bad(c, "the initial response is not base64")
			}
		}
		return true, req, nil
	}
	return false, req, d.bad(c, "unknown command, or not before the login")
}

// bad answers what made no sense; why is a constant and needs no escapes.
func (d *sieveDialect) bad(c *lineConn, why string) error {
	if err := c.strike(); err != nil {
		return err
	}
	return c.writeLines(`NO "` + why + `"`)
}

// sieveInitial decodes an initial response. The empty one is the empty string;
// "=" comes from clients that know IMAP better.
func sieveInitial(text []byte) ([]byte, error) {
	if len(text) == 0 {
		return []byte{}, nil
	}
	return saslInitial(text)
}

// challenge sends and expects base64 in strings; the string "*" cancels (RFC
// 5804 §2.1).
func (d *sieveDialect) challenge(c *lineConn, text []byte) ([]byte, error) {
	// As a literal, as Cyrus does it: sivtest waits for ever behind a quoted one.
	encoded := base64.StdEncoding.EncodeToString(text)
	if err := c.writeLines("{"+strconv.Itoa(len(encoded))+"}", encoded); err != nil {
		return nil, err
	}
	line, err := readSieveLine(c)
	if err != nil {
		return nil, err
	}
	if line.fault != "" || len(line.items) != 1 {
		return nil, failf(Malformed, "authenticate", "the response is not one string")
	}
	response := line.items[0]
	switch {
	case string(response.text) == "*":
		return nil, &Error{Reason: Cancelled, Op: "authenticate"}
	case response.kind != sieveString:
		return nil, failf(Malformed, "authenticate", "the response is not a string")
	}
	p, err := base64.StdEncoding.DecodeString(string(response.text))
	if err != nil {
		return nil, failf(Malformed, "authenticate", "the response is not base64")
	}
	return p, nil
}

func (d *sieveDialect) proceed(c *lineConn, _ request) error {
	return c.writeLines(`OK "Begin TLS negotiation now."`)
}

// sieveAnswers are the answers to a refusal (RFC 5804 §1.3). A plain NO makes
// clients ask for the password again.
var sieveAnswers = map[Reason]string{
	Unavailable:      `NO (TRYLATER) "Account is temporarily unavailable."`,
	Misconfigured:    `NO (TRYLATER) "Account is temporarily unavailable."`,
	RoleDisagreement: `NO (TRYLATER) "Account is temporarily unavailable."`,
	WrongCredentials: `NO "Authentication failed."`,
	NotAuthorized:    `NO "Not authorized to act as this user."`,
	PrivacyRequired:  `NO (ENCRYPT-NEEDED) "Use STARTTLS first."`,
	TooMany:          `BYE "Too many failures."`,
	TooLong:          `BYE "The command is too long."`,
	Cancelled:        `NO "Authentication cancelled."`,
	Malformed:        `NO "Malformed authentication response."`,
	UnknownMechanism: `NO "Unsupported authentication mechanism."`,
	Pipelined:        `BYE "STARTTLS cannot be pipelined."`,
	InUse:            `NO (TRYLATER) "The mailbox is in use."`,
	LoginDelay:       `NO (TRYLATER) "Too many logins, try again later."`,
	ShuttingDown:     `BYE (TRYLATER) "This frontend is being restarted, try again."`,
	TimedOut:         `BYE (TRYLATER) "No login in time."`,
	Overloaded:       `BYE (TRYLATER) "Too many connections."`,
}

func (d *sieveDialect) refuse(c *lineConn, _ request, why Reason) error {
	return c.writeLines(sieveAnswers[why])
}

// admit says one OK and no more: a line too many is taken for the answer to
// the client's next command. The real capabilities come when the client asks.
func (d *sieveDialect) admit(c *lineConn, _ request, w welcome) error {
	text := w.text
	if text == "" {
		text = "Logged in."
	}
	return c.writeLines("OK " + sieveText([]byte(text), ""))
}

func (d *sieveDialect) partingWords() string { return "LOGOUT" }

func (d *sieveDialect) meet(b *lineConn) ([]string, error) {
	tokens, err := d.announced(b, "greeting")
	if err != nil || !b.mustStartTLS {
		return tokens, err
	}
	if err := b.writeLines("STARTTLS"); err != nil {
		return nil, err
	}
	answer, err := readSieveResponse(b)
	if err != nil {
		return nil, err
	}
	if answer.word != "OK" {
		return nil, failf(Misconfigured, "STARTTLS", "the backend refuses TLS: %v", answer)
	}
	if err := b.startTLS(); err != nil {
		return nil, err
	}
	return d.announced(b, "greeting after STARTTLS") // what was said before is forgotten
}

// announced reads a capability response up to its OK, and returns a token
// "KEY word" for each word of each value, and "KEY" where there is none:
// such tokens can be compared between backends one by one.
func (d *sieveDialect) announced(b *lineConn, op string) ([]string, error) {
	var tokens []string
	for range mostCapabilities {
		r, err := readSieveResponse(b)
		if err != nil {
			return nil, err
		}
		switch {
		case r.word == "OK" && r.code == "REFERRAL", r.word == "NO", r.word == "BYE":
			return nil, sieveRefusal(op, r, false)
		case r.word == "OK":
			return tokens, nil
		}
		tokens = append(tokens, r.line.tokens()...)
	}
	return nil, failf(Unavailable, op, "more than %d capabilities", mostCapabilities)
}

// tokens of a capability line.
func (l sieveLine) tokens() (tokens []string) {
	key := strings.ToUpper(string(l.items[0].text))
	if values, ok := l.strings(); ok && len(values) > 0 {
		for _, word := range strings.Fields(string(values[0])) {
			tokens = append(tokens, key+" "+word)
		}
	}
	if tokens == nil {
		tokens = []string{key}
	}
	return tokens
}

func (d *sieveDialect) logIn(b *lineConn, announced []string, as auth.Credentials, from origin) (welcome, error) {
	if !slices.ContainsFunc(announced, func(token string) bool { return strings.EqualFold(token, "SASL PLAIN") }) {
		return welcome{}, failf(Misconfigured, "AUTHENTICATE",
			"the backend offers no SASL PLAIN: allow it there, or set tls.mode to what it demands")
	}
	if words := from.xclient(); words != "" && slices.Contains(announced, xclient) {
		// A refusal only means that its logs show our address.
		if r, err := d.ask(b, words); err != nil {
			return welcome{}, err
		} else if r.word == "BYE" {
			return welcome{}, sieveRefusal("XCLIENT", r, false)
		}
	}
	message := base64.StdEncoding.EncodeToString(plainMessage(as))
	b.claimed = true
	r, err := d.ask(b, `AUTHENTICATE "PLAIN" `+sieveText([]byte(message), "+"))
	if err != nil {
		return welcome{}, err
	}
	if r.word != "OK" {
		b.claimed = false
		return welcome{}, sieveRefusal("AUTHENTICATE", r, true)
	}
	if r.code == "REFERRAL" {
		return welcome{}, sieveRefusal("AUTHENTICATE", r, true)
	}
	for b.pipelined() {
		// Capabilities unasked, which RFC 5804 §2.1 knows only with a SASL
		// security layer: the client must not see them as an answer.
		if _, err := d.announced(b, "AUTHENTICATE"); err != nil {
			return welcome{}, err
		}
	}
	return welcome{text: printable(r.text)}, nil
}

// ask sends a command and reads over everything up to its OK, NO or BYE.
func (d *sieveDialect) ask(b *lineConn, command string) (sieveResponse, error) {
	if err := b.writeLines(command); err != nil {
		return sieveResponse{}, err
	}
	for range mostCapabilities {
		r, err := readSieveResponse(b)
		if err != nil || r.word != "" {
			return r, err
		}
	}
	return sieveResponse{}, failf(Unavailable, "answer", "more than %d lines", mostCapabilities)
}

// sieveRefusal gives a backend's refusal its reason (RFC 5804 §1.3). Its words
// never reach the client. Only the answer to credentials can be about them.
func sieveRefusal(op string, r sieveResponse, credentials bool) error {
	reason := Unavailable
	switch r.code {
	case "":
		if credentials && r.word == "NO" && !soundsTemporary(r.text) {
			reason = WrongCredentials
		}
	case "AUTH-TOO-WEAK", "ENCRYPT-NEEDED", "TRANSITION-NEEDED":
		// The mechanism or the missing TLS, neither of which the client chose.
		reason = Misconfigured
	case "REFERRAL": // the backend sends elsewhere; only the role table does
		return failf(RoleDisagreement, op, "the backend refers to another: %v", r)
	}
	return failf(reason, op, "the backend refuses: %v", r)
}
