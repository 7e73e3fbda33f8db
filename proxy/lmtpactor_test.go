package proxy

import (
	"fmt"
	"strings"
	"sync"
	"time"
)

// manner is how an LMTP backend behaves in one transaction.
type manner struct {
	name string
	// mail, rcpt, data and verdict answer a command and the n-th reply after
	// the dot; an empty answer is yes.
	mail, data    string
	rcpt, verdict func(n int) string
	// The connection is closed instead of the answer to the n-th RCPT, after
	// that many octets of the body, and instead of the n-th verdict.
	endsAtRcpt, endsInBody, endsAtVerdict int
	// babble comes after the last verdict.
	babble string
}

// never is no place to end a connection at.
const never = -1

func newManner(name string, change func(*manner)) manner {
	m := manner{name: name, endsAtRcpt: never, endsInBody: never, endsAtVerdict: never}
	if change != nil {
		change(&m)
	}
	return m
}

// cycle answers in turn.
func cycle(answers ...string) func(int) string {
	return func(n int) string { return answers[n%len(answers)] }
}

var manners = []manner{
	newManner("yes", nil),
	newManner("no to MAIL", func(m *manner) { m.mail = "452 4.3.1 no space" }),
	newManner("421 to MAIL", func(m *manner) { m.mail = "421 4.3.2 going down" }),
	newManner("not every RCPT", func(m *manner) {
		m.rcpt = cycle("", "550-5.1.1 one\r\n550 5.1.1 two", "452 4.2.2 full", "503 5.5.1 what")
	}),
	newManner("421 to RCPT", func(m *manner) { m.rcpt = cycle("", "421 4.3.2 going down") }),
	newManner("ends at RCPT", func(m *manner) { m.endsAtRcpt = 1 }),
	newManner("ends at the first RCPT", func(m *manner) { m.endsAtRcpt = 0 }),
	newManner("421 to DATA", func(m *manner) { m.data = "421 4.3.2 going down" }),
	newManner("451 to DATA", func(m *manner) { m.data = "451 4.3.1 no space" }),
	newManner("554 to DATA", func(m *manner) { m.data = "554 5.7.1 not you" }),
	newManner("250 to DATA", func(m *manner) { m.data = "250 2.0.0 saved" }),
	newManner("ends at DATA", func(m *manner) { m.endsInBody = 0 }),
	newManner("ends in the body", func(m *manner) { m.endsInBody = 1000 }),
	newManner("ends after the dot", func(m *manner) { m.endsAtVerdict = 0 }),
	newManner("ends after a verdict", func(m *manner) { m.endsAtVerdict = 1 }),
	newManner("mixed verdicts", func(m *manner) {
		m.verdict = cycle("", "550 5.7.1 no", "452-4.2.2 full\r\n452 4.2.2 up", "503 5.5.1 what", "421 4.3.2 busy")
	}),
	newManner("says more than it was asked", func(m *manner) { m.babble = "250 2.0.0 one more\r\n" }),
}

// actor is a scripted LMTP backend. What it saw of transactions is noted by
// their senders.
type actor struct {
	name   string
	choose func(sender string) manner

	mu       sync.Mutex
	bodies   map[string]string            // complete, without our trace field, with dots stuffed
	verdicts map[string]map[string]string // sender → recipient → what was sent after a complete body
	answers  map[string]map[string]string // the same after RCPT
	faults   []string
}

func newActor(name string, choose func(string) manner) *actor {
	return &actor{name: name, choose: choose, bodies: make(map[string]string),
		verdicts: make(map[string]map[string]string), answers: make(map[string]map[string]string)}
}

// run serves what comes to the site's backend until done is closed.
func (a *actor) run(s *site, done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case p := <-s.accepted[a.name]:
			go a.serve(p)
		}
	}
}

// note records an answer before it is sent.
func (a *actor) note(in map[string]map[string]string, sender, to, text string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if in[sender] == nil {
		in[sender] = make(map[string]string)
	}
	in[sender][to] = text
}

// said is what was noted.
func (a *actor) said(in map[string]map[string]string, sender, to string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return in[sender][to]
}

func (a *actor) fault(format string, args ...any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.faults = append(a.faults, fmt.Sprintf(format, args...))
}

// serve plays one connection.
func (a *actor) serve(p *peer) {
	defer func() { _ = p.conn.Close() }()
	var sender string
	var m manner
	var accepted []string
	rcpts := 0
	answer := send(p, "220 backend LMTP\r\n")
	for answer == nil {
		_ = p.conn.SetDeadline(time.Now().Add(patience))
		line, err := p.line()
		if err != nil {
			if line != "" && strings.Contains(err.Error(), "CRLF") {
				a.fault("command %q: %v", line, err)
			}
			return
		}
		verb, arg, _ := strings.Cut(line, " ")
		address := strings.TrimSuffix(arg[strings.IndexByte(arg, '<')+1:], ">")
		switch verb {
		case "LHLO":
			answer = send(p, "250-backend\r\n250 PIPELINING\r\n")
		case "MAIL":
			sender, m, accepted, rcpts = address, a.choose(address), nil, 0
			answer = send(p, orYes(m.mail, "250 2.1.0 ok"))
			if m.mail != "" {
				sender = ""
			}
			if strings.HasPrefix(m.mail, "421") {
				return
			}
		case "RCPT":
			if sender == "" {
				answer = send(p, "503 5.5.1 MAIL first\r\n")
				continue
			}
			if rcpts == m.endsAtRcpt {
				return
			}
			text := orYes("", "250 2.1.5 "+address)
			if m.rcpt != nil {
				text = orYes(m.rcpt(rcpts), "250 2.1.5 "+address)
			}
			rcpts++
			if text[0] == '2' {
				accepted = append(accepted, address)
			}
			a.note(a.answers, sender, address, text)
			if answer = send(p, text); strings.HasPrefix(text, "421") {
				return
			}
		case "DATA":
			if len(accepted) == 0 {
				a.fault("DATA without a recipient")
			}
			if m.data != "" {
				answer = send(p, m.data+"\r\n")
				continue
			}
			if !a.receive(p, sender, m, accepted) {
				return
			}
			sender = ""
		case "RSET":
			sender = ""
			answer = send(p, "250 2.0.0 ok\r\n")
		case "QUIT":
			_ = send(p, "221 2.0.0 bye\r\n")
			return
		default:
			a.fault("command %q", line)
			return
		}
	}
}

func orYes(text, yes string) string {
	if text == "" {
		text = yes
	}
	return text + "\r\n"
}

// receive takes a body and gives the verdicts; false: the connection ends.
func (a *actor) receive(p *peer, sender string, m manner, accepted []string) bool {
	if m.endsInBody == 0 || send(p, "354 go\r\n") != nil {
		return false
	}
	var body strings.Builder
	for lines := 0; ; lines++ {
		text, err := p.r.ReadString('\n')
		switch {
		case err != nil:
			return false
		case !strings.HasSuffix(text, "\r\n") || strings.Count(text, "\r") != 1:
			a.fault("line %q of a body", clip([]byte(text)))
		case strings.HasPrefix(text, ".") && !strings.HasPrefix(text, "..") && text != ".\r\n":
			a.fault("line %q has no stuffed dot", clip([]byte(text)))
		}
		if text == ".\r\n" {
			break
		}
		if lines >= 3 { // the trace field
			body.WriteString(text)
		}
		if m.endsInBody > 0 && body.Len() >= m.endsInBody {
			return false
		}
	}
	a.mu.Lock()
	a.bodies[sender] = body.String()
	a.mu.Unlock()
	for n, to := range accepted {
		if n == m.endsAtVerdict {
			return false
		}
		text := orYes("", "250 2.0.0 "+sender+" to "+to)
		if m.verdict != nil {
			text = orYes(m.verdict(n), "250 2.0.0 "+sender+" to "+to)
		}
		a.note(a.verdicts, sender, to, text)
		if n == len(accepted)-1 {
			text += m.babble
		}
		if send(p, text) != nil {
			return false
		}
	}
	return true
}
