package proxy

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/posthouse/posthouse/routing"
)

func imapSite(t *testing.T, settings map[string]string) *site {
	t.Helper()
	all := map[string]string{"listener": "implicit", "backend": "off", "style": "authzid", "done": "logout", "auth": "file", "connections": "4"}
	for key, value := range settings {
		all[key] = value
	}
	return newSite(t, "imap", all)
}

// client connects over TLS and reads the greeting.
func (s *site) client(t *testing.T) *peer {
	t.Helper()
	secured := tls.Client(s.dial(t), &tls.Config{RootCAs: testRoots, ServerName: "localhost"})
	p := newPeer("client", secured)
	if _, err := p.line(); err != nil {
		t.Fatalf("greeting: %v\n%s", err, s.logged())
	}
	return p
}

// dialogue plays steps of a transcript between one client and one backend.
func (s *site) dialogue(t *testing.T, client, backend *peer, steps ...string) *transcript {
	t.Helper()
	tr := &transcript{t: t, site: s, client: client, backend: backend, vars: make(map[string]string),
		clients: map[string]*peer{"": client}, backends: map[string]*peer{"": backend}}
	for _, step := range steps {
		if err := tr.step(step); err != nil {
			t.Fatalf("%s: %v\n%s", step, err, s.logged())
		}
	}
	return tr
}

var loginSteps = []string{
	`C: a LOGIN alice "wonder land"`, ">! accept", "<: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready",
	">: $t AUTHENTICATE PLAIN YWxpY2UAcHJveHkAc2VjcmV0", "<: $t OK [CAPABILITY IMAP4rev1] in", "S: a OK ...",
}

// TestParked: a login that comes during the hold waits and then succeeds, on
// the new active; it was looked up after the wait (peers.md, Stalwart).
func TestParked(t *testing.T) {
	s := imapSite(t, nil)
	first := s.dialogue(t, s.client(t), nil, loginSteps...)
	switched := s.dialogue(t, first.client, first.backend, "switch", ">: $l LOGOUT")

	second := s.client(t)
	s.dialogue(t, second, nil, `C: a LOGIN bob builder`, "log parked", ">! none")
	for _, i := range s.server.Sessions() {
		if i.User == "bob" && i.Action != "waiting for role r1" {
			t.Errorf("bob's session says %q", i.Action)
		}
	}
	for _, step := range []string{"<: * BYE", "<: $l OK", "S: * BYE", "S! eof", "opened"} {
		if err := switched.step(step); err != nil {
			t.Fatalf("%s: %v\n%s", step, err, s.logged())
		}
	}
	s.dialogue(t, second, nil, ">! accept", "<: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready",
		">: $t AUTHENTICATE PLAIN ...", "<: $t OK [CAPABILITY IMAP4rev1] in", "S: a OK ...")
	_ = first.client.conn.Close()
	if err := s.waitFor(func() bool { return s.server.sessions.count() == 1 }); err != nil {
		t.Fatal(err)
	}
	sessions := s.server.Sessions()
	if len(sessions) != 1 || sessions[0].Backend != "b" || sessions[0].User != "bob" || sessions[0].Epoch != 2 {
		t.Errorf("sessions: %+v", sessions)
	}
}

// TestHoldWindow: a login that waits too long is told to come back, and never
// that its password is wrong.
func TestHoldWindow(t *testing.T) {
	s := imapSite(t, map[string]string{"limits": "window=50ms"})
	first := s.dialogue(t, s.client(t), nil, loginSteps...)
	s.dialogue(t, first.client, first.backend, "switch", ">: $l LOGOUT")
	s.dialogue(t, s.client(t), nil, "C: a LOGIN bob builder", "S: a NO [UNAVAILABLE] Account is temporarily unavailable.", ">! none")
}

// A client that leaves while its login waits takes no place any more; what one
// says that stays is kept for the backend.
func TestParkedClientIsWatched(t *testing.T) {
	for _, leaves := range []string{"C! close", "C! reset", "C! half"} {
		t.Run(leaves, func(t *testing.T) {
			s := imapSite(t, nil)
			first := s.dialogue(t, s.client(t), nil, loginSteps...)
			first = s.dialogue(t, first.client, first.backend, "switch", ">: $l LOGOUT")
			stays := s.dialogue(t, s.client(t), nil, "C: a LOGIN bob builder", "log parked", "C: b NOOP")
			gone := s.dialogue(t, s.client(t), nil, "C: a LOGIN bob builder")
			waits := func(n int) {
				t.Helper()
				if err := s.waitFor(func() bool { return s.table.Counters().Parked == n }); err != nil {
					t.Fatalf("%d are parked, want %d", s.table.Counters().Parked, n)
				}
			}
			waits(2)
			s.dialogue(t, gone.client, nil, leaves)
			waits(1)
			for _, step := range []string{"<: * BYE", "<: $l OK", "S: * BYE", "S! eof", "opened"} {
				if err := first.step(step); err != nil {
					t.Fatalf("%s: %v\n%s", step, err, s.logged())
				}
			}
			s.dialogue(t, stays.client, nil, ">! accept", "<: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready",
				">: $t AUTHENTICATE PLAIN ...", "<: $t OK [CAPABILITY IMAP4rev1] in", "S: a OK ...", ">: b NOOP", "<: b OK", "S: b OK")
		})
	}
}

// TestVerifiedBeforeParking: who has no right password cannot park (design §3).
func TestVerifiedBeforeParking(t *testing.T) {
	s := imapSite(t, nil)
	first := s.dialogue(t, s.client(t), nil, loginSteps...)
	s.dialogue(t, first.client, first.backend, "switch", ">: $l LOGOUT")
	s.dialogue(t, s.client(t), nil, "C: a LOGIN bob wrong", "S: a NO [AUTHENTICATIONFAILED] Authentication failed.")
}

// A login with a password that only the backend can judge waits too, and is
// judged by the backend that opens.
func TestSafety31_UnverifiedLoginIsJudgedInTheStay(t *testing.T) {
	s := imapSite(t, map[string]string{"auth": "backend", "style": "replay"})
	first := s.dialogue(t, s.client(t), nil, `C: a LOGIN alice secret`, ">! accept",
		"<: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready", ">: $t AUTHENTICATE PLAIN AGFsaWNlAHNlY3JldA==",
		"<: $t OK [CAPABILITY IMAP4rev1] in", "S: a OK ...")
	first = s.dialogue(t, first.client, first.backend, "switch", ">: $l LOGOUT")
	second := s.dialogue(t, s.client(t), nil, "C: a LOGIN bob builder", "doing waiting for role", ">! none")
	for _, step := range []string{"<: * BYE", "<: $l OK", "opened"} {
		if err := first.step(step); err != nil {
			t.Fatalf("%s: %v\n%s", step, err, s.logged())
		}
	}
	s.dialogue(t, second.client, nil, ">! accept", "<: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready",
		">: $t AUTHENTICATE PLAIN ...", "<: $t NO [AUTHENTICATIONFAILED] wrong", "S: a NO [AUTHENTICATIONFAILED] Authentication failed.")
}

// TestRevokedDuringLogin: a switch finds a login between lookup and answer
// (peers.md, Stalwart and tmail: it escaped). The session is registered before
// the backend is dialled; it leaves with proof, waits, and goes on to b.
func TestRevokedDuringLogin(t *testing.T) {
	for name, c := range map[string]struct{ before, after []string }{
		"before credentials": {
			before: []string{">! accept"},
			after:  []string{">! eof"},
		},
		"after credentials": {
			before: []string{">! accept", "<: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready", ">: $t AUTHENTICATE PLAIN ..."},
			after:  []string{">: $l LOGOUT", "<: $t OK in", "<: * BYE", "<: $l OK", ">! eof"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := imapSite(t, nil)
			tr := s.dialogue(t, s.client(t), nil, append([]string{`C: a LOGIN alice "wonder land"`}, c.before...)...)
			for _, step := range append([]string{"switch"}, append(c.after, "opened")...) {
				if err := tr.step(step); err != nil {
					t.Fatalf("%s: %v\n%s", step, err, s.logged())
				}
			}
			s.dialogue(t, tr.client, nil, ">! accept", "<: * OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready",
				">: $t AUTHENTICATE PLAIN ...", "<: $t OK [CAPABILITY IMAP4rev1] in", "S: a OK ...")
			if sessions := s.server.Sessions(); len(sessions) != 1 || sessions[0].Backend != "b" {
				t.Errorf("sessions: %+v", sessions)
			}
		})
	}
}

// TestShutdown: sessions end as in a switch; a login in progress is refused.
func TestShutdown(t *testing.T) {
	s := imapSite(t, nil)
	in := s.dialogue(t, s.client(t), nil, loginSteps...)
	idle := s.client(t)
	ended := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		ended <- s.server.Shutdown(ctx)
	}()
	s.dialogue(t, in.client, in.backend, ">: $l LOGOUT", "<: * BYE", "<: $l OK", "S: * BYE", "S! eof")
	s.dialogue(t, idle, nil, "S: * BYE [UNAVAILABLE] This frontend is being restarted, try again.", "S! eof")
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestALPN: a client that was led here by another protocol's server is refused
// (ALPACA); who offers the right one, or nothing, is served.
func TestALPN(t *testing.T) {
	s := imapSite(t, nil)
	for _, c := range []struct {
		offer []string
		want  string
		ok    bool
	}{{nil, "", true}, {[]string{"imap"}, "imap", true}, {[]string{"http/1.1"}, "", false}, {[]string{"pop3", "imap"}, "imap", true}} {
		conn := tls.Client(s.dial(t), &tls.Config{RootCAs: testRoots, ServerName: "localhost", NextProtos: c.offer})
		err := conn.Handshake()
		if (err == nil) != c.ok || conn.ConnectionState().NegotiatedProtocol != c.want {
			t.Errorf("offer %q: %v, %q", c.offer, err, conn.ConnectionState().NegotiatedProtocol)
		}
		_ = conn.Close()
	}
	old := tls.Client(s.dial(t), &tls.Config{RootCAs: testRoots, ServerName: "localhost", MaxVersion: tls.VersionTLS11, MinVersion: tls.VersionTLS10})
	if err := old.Handshake(); err == nil {
		t.Error("TLS 1.1 was accepted")
	}
}

// TestConnectionLimits: above the limit the answer is a temporary one, and
// what ends makes room (peers.md, sora: a slot leaked).
func TestConnectionLimits(t *testing.T) {
	s := imapSite(t, map[string]string{"listener": "starttls"})
	var open []*peer
	for range 4 {
		p := newPeer("client", s.dial(t))
		if _, err := p.line(); err != nil {
			t.Fatal(err)
		}
		open = append(open, p)
	}
	s.dialogue(t, newPeer("client", s.dial(t)), nil, "S: * BYE [LIMIT] Too many connections.", "S! eof")
	_ = open[0].conn.Close()
	if err := s.waitFor(func() bool { return s.server.sessions.count() == 3 }); err != nil {
		t.Fatal(err)
	}
	p := newPeer("client", s.dial(t))
	if line, err := p.line(); err != nil || !strings.HasPrefix(line, "* OK") {
		t.Errorf("%q, %v", line, err)
	}
}

// TestHandshakeStops: half a TLS hello ends with preauth_timeout.
func TestHandshakeStops(t *testing.T) {
	s := imapSite(t, map[string]string{"limits": "preauth=50ms"})
	conn := s.dial(t)
	if _, err := conn.Write([]byte{0x16, 0x03, 0x01, 0x02, 0x00, 0x01}); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetDeadline(time.Now().Add(patience))
	if _, err := io.Copy(io.Discard, conn); errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}

// TestLoginStress: logins, ends and switches at the same time; what the
// scripted backends see must never be both of them at once for a user.
func TestLoginStress(t *testing.T) {
	s := imapSite(t, map[string]string{"connections": "100"})
	stop, done := make(chan struct{}), make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case p := <-s.accepted[""]:
				go serveScripted(p)
			case <-done:
				return
			}
		}
	}()
	clients := make(chan error, 3)
	for n := range 3 {
		go func() { clients <- s.logInRepeatedly(n, stop) }()
	}
	for n := range 6 {
		to := []string{"b", "a"}[n%2]
		if _, err := s.table.Switch(t.Context(), routing.SwitchRequest{Role: "r1", To: to, Who: "test"}, nil); err != nil {
			t.Errorf("switch %d: %v", n, err)
		}
	}
	close(stop)
	for range 3 {
		if err := <-clients; err != nil {
			t.Errorf("%v\n%+v\n%s", err, s.server.Sessions(), s.logged())
		}
	}
}

// serveScripted is a backend that lets everybody in and answers LOGOUT.
func serveScripted(p *peer) {
	defer func() { _ = p.conn.Close() }()
	_, _ = io.WriteString(p.conn, "* OK [CAPABILITY IMAP4rev1 SASL-IR AUTH=PLAIN] ready\r\n")
	for {
		line, err := p.line()
		if err != nil {
			return
		}
		tag, rest, _ := strings.Cut(line, " ")
		if rest == "LOGOUT" {
			_, _ = fmt.Fprintf(p.conn, "* BYE\r\n%s OK\r\n", tag)
			return
		}
		_, _ = fmt.Fprintf(p.conn, "%s OK [CAPABILITY IMAP4rev1] done\r\n", tag)
	}
}

// logInRepeatedly logs in and works until stop; every end must be a BYE, and
// every login succeed.
func (s *site) logInRepeatedly(n int, stop chan struct{}) error {
	for {
		conn, err := tls.Dial("tcp", s.listener.Addr().String(), &tls.Config{RootCAs: testRoots, ServerName: "localhost"})
		if err != nil {
			return err
		}
		p := newPeer("client", conn)
		_, _ = io.WriteString(conn, "a LOGIN alice \"wonder land\"\r\n")
		for _, want := range []string{"* OK", "a OK"} {
			if line, err := p.line(); err != nil || !strings.HasPrefix(line, want) {
				return fmt.Errorf("client %d: got %q, %w, want %s", n, line, err, want)
			}
		}
		for work := 0; ; work++ {
			select {
			case <-stop:
				_ = conn.Close()
				return nil
			default:
			}
			if _, err := fmt.Fprintf(conn, "b%d NOOP\r\n", work); err != nil {
				break
			}
			line, err := p.line()
			if strings.HasPrefix(line, "* BYE") {
				break
			}
			if err != nil {
				return fmt.Errorf("client %d: no BYE: %w", n, err)
			}
		}
		_ = conn.Close()
	}
}
