package proxy

import (
	"bufio"
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/posthouse/posthouse/proxy/splice"
	"github.com/posthouse/posthouse/routing"
)

// TestTranscripts plays every testdata/<protocol>/*.txt: a client and a
// scripted backend, with the real server between them.
//
// A line is one step, in order. `S: ` expects a line at the client, `C: `
// sends one from it; `>: ` expects one at the backend, `<: ` sends one from
// it. CRLF is added. `C~ `, `<~ ` send a Go-quoted string as it is. `$name` in
// an expected line matches a word and remembers it, elsewhere it stands for
// it; `...` matches anything. The other steps:
//
//	C! tls      the client does its handshake      >! tls     so does the backend
//	C! close    the client closes                  <! close   so does the backend
//	C! half     the client half-closes             <! reset   the backend resets
//	S! eof      the client sees a clean end        >! eof     so does the backend
//	>! accept   the backend gets a connection      >! none    it has got none
//	S~ "a"      the client gets these octets       >~ "a"     so does the backend
//	C! endless  a line of twice the limit          <! endless so does the backend
//	kick        the administrator ends all sessions
//	switch      role r1 is switched to backend b; it goes on in the background
//	switch R B  the same for role R and backend B
//	opened      the switch has ended well          aborted    it has not
//	opened R    the same for role R's              doing TEXT a session's action contains TEXT
//	log TEXT    a log line contains TEXT           residue N  the table knows N residues
//	silent TEXT no log line contains TEXT          shutdown   the frontend stops
//
// LMTP has several backends, a and b of role r1 (alice, bob, dave@example.org),
// c and d of r2 (carol), e of r3 (erin), each with listeners of its own: `>a: `, `<c~ `,
// `<a! close`, `>c! accept` name them; a name stays with the last connection
// accepted there. `<a! greet KEYWORDS` accepts one, greets it, and answers its
// LHLO with those keywords, which commas part, `_` for a space. `<a! take` gets
// DATA and our trace field; `>a! cut` sees its connection end, in whatever
// manner, and no final dot before it; `<a! down` accepts no more connections.
// `C2: `, `S2: ` are a second client, which comes with its first step.
//
// Settings come first: `listener: starttls|implicit` (default implicit, after
// the handshake and the greeting of the client), `backend: off|starttls|
// implicit`, `style: authzid|master-user|replay`, `done: logout|eof`,
// `auth: file|backend`, `shared: TOKENS` announced by the actives,
// `limits: NAME=DURATION`; for LMTP, whose `listener` may be off (the default),
// `peer: trusted|stranger`, `bare: reject|normalize`, `lhlo: eaten|said`,
// `recipients: N`, `berths: N` (connections to a backend), `certificates:
// demanded`, and `shared: A / C` where the actives a and c differ.
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no transcripts: %v", err)
	}
	for _, file := range files {
		protocol := filepath.Base(filepath.Dir(file))
		name := strings.TrimSuffix(filepath.Base(file), ".txt")
		t.Run(protocol+"/"+name, func(t *testing.T) {
			t.Parallel()
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			play(t, protocol, string(text))
		})
	}
}

// patience bounds each step: long enough for a loaded machine under -race.
const patience = 20 * time.Second

// peer is one side of a transcript.
type peer struct {
	name string
	conn net.Conn
	r    *bufio.Reader
}

func newPeer(name string, conn net.Conn) *peer {
	_ = conn.SetDeadline(time.Now().Add(patience))
	return &peer{name: name, conn: conn, r: bufio.NewReader(conn)}
}

func (p *peer) line() (string, error) {
	text, err := p.r.ReadString('\n')
	if err != nil {
		return text, err
	}
	if !strings.HasSuffix(text, "\r\n") {
		return text, fmt.Errorf("line %q does not end with CRLF", text)
	}
	return strings.TrimSuffix(text, "\r\n"), nil
}

type transcript struct {
	t         *testing.T
	site      *site
	client    *peer            // the one that speaks
	clients   map[string]*peer // by name; "" is the first
	eat       func()           // what the server says first
	backend   *peer            // the one that speaks
	backends  map[string]*peer // by name; "" is the last accepted
	speaks    string           // its name
	vars      map[string]string
	switching map[string]chan error // by role
}

// defaultSettings are what a transcript that sets nothing gets.
func defaultSettings(protocol string) map[string]string {
	settings := map[string]string{
		"listener": "implicit", "backend": "off", "style": "authzid", "done": "logout", "auth": "file", "shared": "", "limits": "", "greeting": "eaten", "connections": "4",
		"peer": "trusted", "bare": "", "lhlo": "eaten", "recipients": "100", "berths": "4", "certificates": "",
	}
	if protocol == "lmtp" {
		settings["listener"] = "off"
	}
	return settings
}

func play(t *testing.T, protocol, text string) {
	settings := defaultSettings(protocol)
	lines := strings.Split(text, "\n")
	first := 0
	for ; first < len(lines); first++ {
		line := strings.TrimSpace(lines[first])
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, value, _ := strings.Cut(line, ":")
		if _, known := settings[key]; !known {
			break
		}
		settings[key] = strings.TrimSpace(value)
	}
	s := newSite(t, protocol, settings)
	tr := &transcript{t: t, site: s, vars: make(map[string]string), clients: make(map[string]*peer), backends: make(map[string]*peer)}
	tr.client = newPeer("client", s.dial(t))
	if settings["listener"] == "implicit" {
		tr.handshake()
	}
	tr.eat = func() {
		if settings["greeting"] == "eaten" {
			tr.eatGreeting(protocol)
		}
		if protocol == "lmtp" && settings["lhlo"] == "eaten" {
			tr.eatHello()
		}
	}
	tr.eat()
	tr.clients[""] = tr.client
	for n, line := range lines[first:] {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		if err := tr.step(line); err != nil {
			t.Fatalf("line %d, %s: %v\n%s", first+n+1, line, err, s.logged())
		}
	}
	s.finish(t, tr)
}

func (tr *transcript) eatGreeting(protocol string) {
	for {
		line, err := tr.client.line()
		if err != nil {
			tr.t.Fatalf("greeting: %v\n%s", err, tr.site.logged())
		}
		if protocol != "sieve" || strings.HasPrefix(line, "OK") {
			return
		}
	}
}

// eatHello says LHLO.
func (tr *transcript) eatHello() {
	if err := send(tr.client, "LHLO mx.example.net\r\n"); err != nil {
		tr.t.Fatal(err)
	}
	for {
		line, err := tr.client.line()
		if err != nil {
			tr.t.Fatalf("LHLO: %v\n%s", err, tr.site.logged())
		}
		if strings.HasPrefix(line, "250 ") {
			return
		}
	}
}

// named is a step that names its peer, as in `>a: ` or `C2: `.
var named = regexp.MustCompile(`^([<>CS])([a-z0-9]?)([:~!])`)

// address makes the peer that a step names the one that speaks, and returns
// the step without the name.
func (tr *transcript) address(line string) string {
	m := named.FindStringSubmatch(line)
	if m == nil {
		return line
	}
	line = m[1] + m[3] + line[len(m[0]):]
	if m[1] == "<" || m[1] == ">" {
		tr.speaks = m[2]
		tr.backend = tr.backends[m[2]]
		return line
	}
	if tr.clients[m[2]] == nil {
		tr.client = newPeer("client", tr.site.dial(tr.t))
		tr.clients[m[2]] = tr.client
		tr.eat()
	}
	tr.client = tr.clients[m[2]]
	return line
}

func (tr *transcript) handshake() {
	secured := tls.Client(tr.client.conn, &tls.Config{RootCAs: testRoots, ServerName: "localhost"})
	if err := secured.Handshake(); err != nil {
		tr.t.Fatalf("client TLS: %v\n%s", err, tr.site.logged())
	}
	tr.client = newPeer("client", secured)
}

func (tr *transcript) step(line string) error {
	line = tr.address(line)
	word, rest, _ := strings.Cut(line, " ")
	switch word {
	case "S:":
		return tr.expect(tr.client, rest)
	case ">:":
		return tr.expect(tr.backend, rest)
	case "C:":
		return send(tr.client, tr.fill(rest)+"\r\n")
	case "<:":
		return send(tr.backend, tr.fill(rest)+"\r\n")
	case "S~":
		return expectOctets(tr.client, rest)
	case ">~":
		return expectOctets(tr.backend, rest)
	case "C~", "<~":
		text, err := strconv.Unquote(rest)
		if err != nil {
			return err
		}
		if word == "C~" {
			return send(tr.client, tr.fill(text))
		}
		return send(tr.backend, tr.fill(text))
	case "C!", "<!", ">!", "S!":
		return tr.act(line)
	case "kick":
		tr.site.server.sessions.endAll(splice.Kicked)
		return nil
	case "switch":
		return tr.startSwitch(rest)
	case "opened":
		return <-tr.switching[cmp.Or(rest, "r1")]
	case "aborted":
		if err := <-tr.switching[cmp.Or(rest, "r1")]; err == nil {
			return errors.New("the switch went through")
		}
		return nil
	case "doing":
		return tr.site.waitFor(func() bool {
			return slices.ContainsFunc(tr.site.server.Sessions(), func(i SessionInfo) bool { return strings.Contains(i.Action, rest) })
		})
	case "log":
		return tr.site.waitFor(func() bool { return strings.Contains(tr.site.logged(), rest) })
	case "silent":
		if strings.Contains(tr.site.logged(), rest) {
			return errors.New("it was logged")
		}
		return nil
	case "residue":
		return tr.site.waitFor(func() bool {
			r := tr.site.table.Roles()[0]
			return fmt.Sprint(len(r.Unhanded)+len(r.Residues)) == rest && r.Inside == 0
		})
	case "shutdown":
		tr.site.stop()
		return nil
	}
	return errors.New("no such step")
}

// startSwitch switches a role, r1 to b if none is named, and returns when the
// role is held.
func (tr *transcript) startSwitch(arg string) error {
	role, to, _ := strings.Cut(cmp.Or(arg, "r1 b"), " ")
	before, done := tr.site.table.Snapshot().Roles[role].Epoch, make(chan error, 1)
	if tr.switching == nil {
		tr.switching = make(map[string]chan error)
	}
	tr.switching[role] = done
	go func() {
		_, err := tr.site.table.Switch(context.Background(), routing.SwitchRequest{Role: role, To: to, Who: "test"}, nil)
		done <- err
	}()
	return tr.site.waitFor(func() bool { return tr.site.table.Snapshot().Roles[role].Epoch != before })
}

// take gets DATA at an LMTP backend, and the trace field.
func (tr *transcript) take() error {
	if err := tr.expect(tr.backend, "DATA"); err != nil {
		return err
	}
	if err := send(tr.backend, "354 go ahead\r\n"); err != nil {
		return err
	}
	for _, line := range []string{"Received: from ...", "\tby mail.example.org with ...;", "\t..."} {
		if err := tr.expect(tr.backend, line); err != nil {
			return err
		}
	}
	return nil
}

// cut expects that a backend's connection ends without the final dot.
func cut(p *peer) error {
	rest, err := io.ReadAll(p.r)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fmt.Errorf("it does not end; %q came", rest)
	case strings.HasSuffix("\r\n"+string(rest), "\r\n.\r\n"):
		return fmt.Errorf("%q came before the end", rest)
	}
	return nil
}

// greet accepts a connection to an LMTP backend and answers until its LHLO.
func (tr *transcript) greet(keywords []string) (err error) {
	if err = tr.act(">! accept"); err != nil {
		return err
	}
	if err = send(tr.backend, "220 backend LMTP\r\n"); err != nil {
		return err
	}
	if err = tr.expect(tr.backend, "LHLO mail.example.org"); err != nil {
		return err
	}
	lines := append([]string{"backend"}, keywords...)
	return send(tr.backend, string(newReply(250, lines...).append(nil)))
}

func (tr *transcript) act(line string) (err error) {
	if keywords, found := strings.CutPrefix(line, "<! greet"); found {
		keywords = strings.ReplaceAll(keywords, "_", " ")
		return tr.greet(append([]string{"PIPELINING"}, slices.DeleteFunc(strings.Split(strings.TrimSpace(keywords), ","), func(k string) bool { return k == "" })...))
	}
	switch line {
	case "C! tls":
		tr.handshake()
		tr.clients[""] = tr.client
	case "C! close":
		err = tr.client.conn.Close()
	case "C! half":
		err = tr.client.conn.(interface{ CloseWrite() error }).CloseWrite()
	case "C! reset":
		reset(tr.client.conn)
	case "S! eof":
		err = atEnd(tr.client)
	case ">! accept":
		tr.backend, err = tr.site.accept(tr.speaks)
		tr.backends[tr.speaks] = tr.backend
	case ">! tls":
		secured := tls.Server(tr.backend.conn, &tls.Config{Certificates: []tls.Certificate{testCertificate}})
		if err = secured.Handshake(); err == nil {
			tr.backend = newPeer("backend", secured)
			tr.backends[tr.speaks] = tr.backend
		}
	case ">! none":
		select {
		case <-tr.site.accepted[tr.speaks]:
			err = errors.New("the backend was connected to")
		default:
		}
	case "<! take":
		err = tr.take()
	case "<! down":
		err = tr.site.backends[tr.speaks].Close()
	case ">! cut":
		err = cut(tr.backend)
	case "<! close":
		err = tr.backend.conn.Close()
	case "<! reset":
		reset(tr.backend.conn)
	case "C! endless", "<! endless":
		p := tr.client
		if line[0] == '<' {
			p = tr.backend
		}
		_, _ = io.WriteString(p.conn, strings.Repeat("x", 2*maxLine)) // it may be cut off meanwhile
	case ">! eof":
		err = atEnd(tr.backend)
	default:
		err = errors.New("no such step")
	}
	return err
}

func reset(conn net.Conn) {
	if t, ok := conn.(*tls.Conn); ok {
		conn = t.NetConn()
	}
	_ = conn.(*net.TCPConn).SetLinger(0)
	_ = conn.Close()
}

// atEnd expects a clean end: EOF after a close_notify where TLS is on.
func atEnd(p *peer) error {
	rest, err := io.ReadAll(p.r)
	if err != nil {
		return fmt.Errorf("no clean end: %w", err)
	}
	if len(rest) > 0 {
		return fmt.Errorf("%q came before the end", rest)
	}
	return nil
}

func send(p *peer, text string) error {
	_, err := io.WriteString(p.conn, text)
	return err
}

func expectOctets(p *peer, quoted string) error {
	text, err := strconv.Unquote(quoted)
	if err != nil {
		return err
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(p.r, got); err != nil || string(got) != text {
		return fmt.Errorf("got %q: %w", got, err)
	}
	return nil
}

var variable = regexp.MustCompile(`\$[a-z]+`)

func (tr *transcript) fill(text string) string {
	return variable.ReplaceAllStringFunc(text, func(name string) string {
		if value, ok := tr.vars[name]; ok {
			return value
		}
		return name
	})
}

func (tr *transcript) expect(p *peer, want string) error {
	if p == nil {
		return errors.New("the backend was not connected to yet")
	}
	got, err := p.line()
	if err != nil {
		return fmt.Errorf("got %q: %w", got, err)
	}
	var names []string
	pattern := regexp.QuoteMeta(tr.fill(want))
	pattern = strings.ReplaceAll(pattern, `\.\.\.`, `.*`)
	pattern = regexp.MustCompile(`\\\$[a-z]+`).ReplaceAllStringFunc(pattern, func(name string) string {
		names = append(names, name[1:])
		return `(\S+)`
	})
	found := regexp.MustCompile("^" + pattern + "$").FindStringSubmatch(got)
	if found == nil {
		return fmt.Errorf("got  %q", got)
	}
	for i, name := range names {
		tr.vars[name] = found[i+1]
	}
	return nil
}
