package proxy

import (
	"bytes"
	"crypto/tls"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// mta is the client of TestLMTPInvariants.
type mta struct {
	t      *testing.T
	p      *peer
	random *rand.Rand
	actors map[string]*actor
}

// reply reads one reply with all its lines.
func (c *mta) reply() string {
	var text strings.Builder
	for {
		line, err := c.p.line()
		if err != nil || len(line) < 4 {
			c.t.Fatalf("reply %q: %v", text.String()+line, err)
		}
		text.WriteString(line + "\r\n")
		if line[3] == ' ' {
			return text.String()
		}
	}
}

// whereTo says which backend gets a recipient, and under which address.
func whereTo(to string) (backend, address string) {
	user, _, _ := strings.Cut(to, "@")
	name, detail, _ := strings.Cut(strings.ToLower(user), "+")
	if detail != "" {
		detail = "+" + detail
	}
	switch name {
	case "alice", "bob":
		return "a", name + detail
	case "dave":
		return "a", name + detail + "@example.org"
	case "carol":
		return "c", name + detail
	case "erin":
		return "e", name + detail
	}
	return "", ""
}

var places = []string{"alice", "Alice@example.org", "bob", "bob+x@example.org", "dave@Example.ORG", "dave+y@example.org", "carol", "carol+x", "CAROL+x@example.org",
	"erin@example.org", "erin+z", "nobody@example.org", "unsure@example.org"}

// transact plays one transaction and checks every reply.
func (c *mta) transact(sender string) {
	_ = c.p.conn.SetDeadline(time.Now().Add(patience))
	to := make([]string, 1+c.random.IntN(6))
	command := "MAIL FROM:<" + sender + ">\r\n"
	for n := range to {
		to[n] = places[c.random.IntN(len(places))]
		command += "RCPT TO:<" + to[n] + ">\r\n"
	}
	c.send(command)
	if r := c.reply(); r[0] != '2' {
		c.t.Fatalf("%s: MAIL: %s", sender, r)
	}
	var accepted []string
	for _, rcpt := range to {
		r := c.reply()
		backend, address := whereTo(rcpt)
		said := ""
		if backend != "" {
			said = c.actors[backend].said(c.actors[backend].answers, sender, address)
		}
		switch {
		case r[0] == '2':
			accepted = append(accepted, rcpt)
			if r != said {
				c.t.Errorf("%s: RCPT of %s: %q, the backend said %q", sender, rcpt, r, said)
			}
		case r[0] == '5' && r != said && !strings.HasPrefix(rcpt, "nobody"):
			c.t.Errorf("%s: RCPT of %s is refused by nobody: %q, the backend said %q", sender, rcpt, r, said)
		}
	}
	c.message(sender, accepted)
	// Exactly as many replies as there should be have come.
	c.send("NOOP\r\n")
	if r := c.reply(); r != "250 2.0.0 OK\r\n" {
		c.t.Fatalf("%s: out of step: %s", sender, r)
	}
}

func (c *mta) send(text string) {
	if err := send(c.p, text); err != nil {
		c.t.Fatal(err)
	}
}

// message sends the body, by DATA or by BDAT, and checks a reply for each
// accepted recipient.
func (c *mta) message(sender string, accepted []string) {
	var body strings.Builder
	body.WriteString("Subject: " + sender + "\r\n\r\n")
	for range c.random.IntN(300) {
		body.WriteString(strings.Repeat(".", c.random.IntN(3)) + strings.Repeat("x", c.random.IntN(30)) + "\r\n")
	}
	stuffed := strings.ReplaceAll(body.String(), "\r\n.", "\r\n..")
	if c.random.IntN(2) == 0 {
		c.send("DATA\r\n")
		if r := c.reply(); r[:3] != "354" {
			if r[0] == '2' || r[0] == '5' && len(accepted) > 0 {
				c.t.Errorf("%s: DATA: %s", sender, r)
			}
			c.rset()
			return
		}
		c.send(stuffed + ".\r\n")
	} else {
		cut := c.random.IntN(body.Len())
		c.send(fmt.Sprintf("BDAT %d\r\n%s", cut, body.String()[:cut]))
		first := c.reply()
		c.send(fmt.Sprintf("BDAT %d LAST\r\n%s", body.Len()-cut, body.String()[cut:]))
		if first[0] != '2' {
			if r := c.reply(); r[0] == '2' || r[0] == '5' && r[:3] != "503" {
				c.t.Errorf("%s: BDAT: %s", sender, r)
			}
			c.rset()
			return
		}
	}
	for _, rcpt := range accepted {
		r := c.reply()
		backend, address := whereTo(rcpt)
		a := c.actors[backend]
		said := a.said(a.verdicts, sender, address)
		m := a.choose(sender)
		switch {
		case r[0] == '2' && r != said, strings.HasPrefix(said, "2") && r != said:
			c.t.Errorf("%s: %s gets %q, the backend, %s, said %q", sender, rcpt, r, m.name, said)
		case r[0] == '5' && r != said && r != m.data+"\r\n":
			c.t.Errorf("%s: %s is refused by nobody: %q, the backend, %s, said %q", sender, rcpt, r, m.name, said)
		}
	}
	for _, a := range c.actors {
		a.mu.Lock()
		if got, complete := a.bodies[sender]; complete && got != stuffed {
			c.t.Errorf("%s: backend %s got %d octets of %d", sender, a.name, len(got), len(stuffed))
		}
		a.mu.Unlock()
	}
}

func (c *mta) rset() {
	c.send("RSET\r\n")
	if r := c.reply(); r[0] != '2' {
		c.t.Fatalf("RSET: %s", r)
	}
}

// newMTA connects and says LHLO.
func newMTA(t *testing.T, s *site, seed uint64, actors map[string]*actor) *mta {
	c := &mta{t: t, p: newPeer("client", s.dial(t)), random: rand.New(rand.NewPCG(1, seed)), actors: actors}
	c.reply()
	c.send("LHLO mx.example.net\r\n")
	c.reply()
	return c
}

// Whatever three backends do, together or each for itself: after the dot there
// is one reply for each accepted RCPT, in their order; 2xx is only what the
// backend has said of that recipient after the complete message; 5xx is only
// what it has said; and nothing is left. Several MTAs share the backends'
// connections.
func TestLMTPInvariants(t *testing.T) {
	const mtas, transactions = 4, 75
	settings := defaultSettings("lmtp")
	settings["connections"] = "10"
	s := newSite(t, "lmtp", settings)
	done := make(chan struct{})
	actors := make(map[string]*actor)
	for n, name := range []string{"a", "c", "e"} {
		actors[name] = newActor(name, func(sender string) manner {
			at, _, _ := strings.Cut(sender, "@")
			seed, _ := strconv.ParseUint(at[1:], 10, 64)
			return manners[rand.New(rand.NewPCG(seed, uint64(n))).IntN(len(manners))]
		})
		go actors[name].run(s, done)
	}
	var sending sync.WaitGroup
	for n := range mtas {
		c := newMTA(t, s, uint64(n), actors)
		sending.Go(func() {
			for i := range transactions {
				if !t.Failed() {
					c.transact(fmt.Sprintf("t%d@example.net", 1000*n+i))
				}
			}
			_ = c.p.conn.Close()
		})
	}
	sending.Wait()
	for _, name := range slices.Sorted(maps.Keys(actors)) {
		a := actors[name]
		a.mu.Lock()
		for _, fault := range a.faults {
			t.Errorf("backend %s: %s", name, fault)
		}
		if len(a.verdicts) == 0 {
			t.Errorf("backend %s got no message", name)
		}
		a.mu.Unlock()
	}
	if t.Failed() {
		t.Log(s.logged())
	}
	s.finish(t, &transcript{})
	close(done)
	s.end(t)
	if err := s.waitFor(func() bool { return !atWork.MatchString(goroutines()) }); err != nil {
		t.Errorf("somebody is still at work:\n%s", goroutines())
	}
}

// atWork finds the goroutines of sessions, deliveries and backends.
var atWork = regexp.MustCompile(`proxy\.\(\*(lmtp\w*|transaction|Server|actor)\)`)

func goroutines() string {
	p := make([]byte, 1<<20)
	return string(p[:runtime.Stack(p, true)])
}

// An MTA that does not read its replies keeps no stay, no backend connection
// and no session.
func TestLMTPDeafMTA(t *testing.T) {
	settings := defaultSettings("lmtp")
	settings["limits"] = "write=200ms"
	s := newSite(t, "lmtp", settings)
	long := strings.Repeat("550-5.7.1 "+strings.Repeat("x", 400)+"\r\n", mostReplyLines-1) + "550 5.7.1 no"
	a := newActor("a", func(string) manner {
		return newManner("long", func(m *manner) { m.verdict = cycle(long) })
	})
	done := make(chan struct{})
	defer close(done)
	go a.run(s, done)
	narrow := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		return raw.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4096) })
	}}
	conn, err := narrow.DialContext(t.Context(), "tcp", s.listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	// More than the kernel keeps for who does not read.
	for n := range 4 {
		text := ""
		if n == 0 {
			text = "LHLO mx.example.net\r\n"
		}
		text += fmt.Sprintf("MAIL FROM:<t%d@example.net>\r\n", n)
		for i := range 100 {
			text += fmt.Sprintf("RCPT TO:<alice+%d>\r\n", i)
		}
		_, _ = io.WriteString(conn, text+"DATA\r\nhello\r\n.\r\n")
	}
	if err := s.waitFor(func() bool {
		a.mu.Lock()
		defer a.mu.Unlock()
		return len(a.bodies) > 0
	}); err != nil {
		t.Fatal(err)
	}
	if err := s.waitFor(func() bool { return s.server.sessions.count() == 0 && s.table.Counters().Inside == 0 }); err != nil {
		t.Errorf("%v: %v", err, s.server.Sessions())
	}
	a.mu.Lock()
	if len(a.bodies) == 0 || len(a.faults) > 0 {
		t.Errorf("%d messages, %v", len(a.bodies), a.faults)
	}
	a.mu.Unlock()
	s.finish(t, &transcript{})
}

// Where certificates are demanded, an MTA without one gets no word.
func TestLMTPClientCertificate(t *testing.T) {
	settings := defaultSettings("lmtp")
	settings["listener"], settings["certificates"] = "implicit", "demanded"
	s := newSite(t, "lmtp", settings)
	for _, shown := range [][]tls.Certificate{nil, {testCertificate}} {
		conn := tls.Client(s.dial(t), &tls.Config{RootCAs: testRoots, ServerName: "localhost", Certificates: shown})
		p := newPeer("client", conn)
		if line, err := p.line(); (err == nil) != (shown != nil) {
			t.Errorf("with %d certificates: %q, %v", len(shown), line, err)
		}
		_ = conn.Close()
	}
	s.finish(t, &transcript{})
}

// FuzzLMTPInput feeds what a stranger may send: the server answers each command
// with the replies that it is due and never hangs; backends see only whole
// commands and bodies that have one reading.
func FuzzLMTPInput(f *testing.F) {
	const begin = "LHLO x\r\nMAIL FROM:<t1@example.net>\r\nRCPT TO:<alice>\r\nRCPT TO:<carol+a>\r\nRCPT TO:<Alice>\r\nRCPT TO:<nobody>\r\n"
	for _, rest := range []string{
		"", "DATA\r\nhello\r\n.\r\nQUIT\r\n", "DATA\r\na\n.\nb\r.\rc\r\n.\r\r\n.\r\nNOOP\r\n", "DATA\r\nhalf",
		"BDAT 4\r\na\r\nbBDAT 0 LAST\r\nRSET\r\n", "BDAT 3\r\na\nbBDAT 5 LAST\r\nQUIT\nNOOP\r\n", "BDAT x\r\nQUIT\r\n", "BDAT 0 0\r\nQUIT\r\n",
		"RSET\r\nDATA\r\nBDAT 6\r\nQUIT\r\nMAIL FROM:<> SIZE=1\r\nXCLIENT ADDR=IPV6:::1\r\n", "LHLO y\r\nSTARTTLS\r\nEHLO z\r\n",
		"RCPT TO:<\"a\\\"> b\"@[IPv6:::1]>\r\nVRFY\r\n\r\n \r\nXFORWARD NAME=a+0D\r\n", strings.Repeat("x", mostCommand+10) + "\r\n",
	} {
		f.Add([]byte(begin+rest), true)
		f.Add([]byte(begin+rest), false)
	}
	sites, actors := make(map[bool]*site), []*actor{}
	for _, trusted := range []bool{false, true} {
		settings := defaultSettings("lmtp")
		settings["connections"] = "100"
		if !trusted {
			settings["peer"] = "stranger"
		}
		sites[trusted] = newSite(f, "lmtp", settings)
		for _, name := range []string{"a", "c", "e"} {
			a := newActor(name, func(string) manner { return manners[0] })
			go a.run(sites[trusted], f.Context().Done())
			actors = append(actors, a)
		}
	}
	f.Fuzz(func(t *testing.T, input []byte, trusted bool) {
		s := sites[trusted]
		conn, err := net.Dial("tcp", s.listener.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = conn.Close() }()
		_ = conn.SetDeadline(time.Now().Add(patience / 2))
		go func() {
			_, _ = conn.Write(input) // the server may hang up meanwhile
			_ = conn.(*net.TCPConn).CloseWrite()
		}()
		output, err := io.ReadAll(conn)
		if err != nil && !isGone(err) {
			t.Fatalf("it hangs: %v\n%q\n%v", err, output, s.server.Sessions())
		}
		checkReplies(t, input, output, err == nil)
		for _, a := range actors {
			a.mu.Lock()
			if len(a.faults) > 0 {
				t.Errorf("backend %s: %v", a.name, a.faults)
			}
			clear(a.bodies)
			clear(a.verdicts)
			clear(a.answers)
			a.mu.Unlock()
		}
		if err := s.waitFor(func() bool { return s.server.sessions.count() == 0 }); err != nil {
			t.Errorf("%v: %v", err, s.server.Sessions())
		}
		if n := s.table.Counters().Inside; n != 0 {
			t.Errorf("%d stays are left", n)
		}
		_ = s.logs.TakeAll() // nobody reads them
	})
}

// checkReplies goes through a conversation in the simplest way that RFC 2033
// and RFC 3030 allow: each command has one reply, the end of a message one for
// each accepted recipient.
func checkReplies(t *testing.T, input, output []byte, whole bool) {
	codes := replyCodes(t, output, whole)
	if len(codes) == 0 || codes[0] != 220 {
		t.Fatalf("greeting %q", output)
	}
	codes = codes[1:]
	accepted, refused := 0, false
	for {
		end := bytes.IndexByte(input, '\n')
		if end < 0 || len(codes) == 0 {
			break
		}
		line := strings.TrimRight(strings.TrimSuffix(string(input[:end]), "\r"), " \t")
		input = input[end+1:]
		verb, arg, _ := strings.Cut(line, " ")
		code, due := codes[0], 0
		codes = codes[1:]
		switch verb = upper(verb); {
		case code == 221 || code == 421:
			input = nil // the connection has ended
		case verb == "MAIL" && code == 250, verb == "RSET", verb == "LHLO" && code == 250, verb == "XCLIENT" && code == 220:
			accepted, refused = 0, false
		case verb == "RCPT" && code == 250:
			accepted++
		case verb == "DATA" && code == 354:
			n := bytes.Index(append([]byte("\r\n"), input...), []byte("\r\n.\r\n"))
			if n < 0 {
				input = nil
				break
			}
			input = input[n+3:]
			due, accepted = accepted, 0
		case verb == "BDAT":
			digits, last, _ := strings.Cut(strings.TrimLeft(arg, " "), " ")
			last = upper(strings.TrimLeft(last, " "))
			n, err := strconv.ParseUint(digits, 10, 31)
			if err != nil || last != "" && last != "LAST" { // the connection has ended
				input = nil
				break
			}
			input = input[min(int(n), len(input)):]
			if last != "" && accepted > 0 && !refused {
				due, accepted = accepted-1, 0 // the first has been taken
			} else if code != 250 {
				refused = accepted > 0
			}
		}
		if due > len(codes) {
			t.Fatalf("%q: %d replies are due, %d are there: %q", line, due, len(codes), output)
		}
		codes = codes[due:]
	}
	// The last word is the server's, if it ends the connection.
	if len(codes) > 1 || len(codes) == 1 && codes[0] != 421 && codes[0] != 500 && codes[0] != 501 {
		t.Errorf("replies %v to nothing: %q", codes, output)
	}
}

// replyCodes checks the replies' form.
func replyCodes(t *testing.T, output []byte, whole bool) (codes []int) {
	lines := strings.SplitAfter(string(output), "\n")
	if rest := lines[len(lines)-1]; rest != "" && whole {
		t.Fatalf("half a line %q", rest)
	}
	for _, line := range lines[:len(lines)-1] {
		code, more, _, ok := parseReplyLine([]byte(strings.TrimSuffix(line, "\r\n")))
		if !ok || strings.Count(line, "\r") != 1 || !strings.HasSuffix(line, "\r\n") {
			t.Fatalf("reply %q", line)
		}
		if !more {
			codes = append(codes, code)
		}
	}
	return codes
}
