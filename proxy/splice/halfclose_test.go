package splice

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// insideLiteral follows a session that is cut off inside a command: there are
// no words to say, only a half-close.
type insideLiteral struct{}

func (insideLiteral) Up([]byte) error        { return nil }
func (insideLiteral) Down(p []byte) []byte   { return p }
func (insideLiteral) Farewell() []byte       { return nil }
func (insideLiteral) Midway() bool           { return false } // let it be cut off
func (insideLiteral) Leaving() bool          { return false }
func (insideLiteral) Nudge() []byte          { return nil }
func (insideLiteral) Proven() bool           { return false }
func (insideLiteral) LastWords(Cause) []byte { return nil }
func (insideLiteral) Ended(clean, halfClosed, eofProves bool) bool {
	return clean && halfClosed && eofProves
}

// Cyrus 3.6, cut off inside an APPEND's literal under TLS, takes the
// close_notify for the end of the literal, answers NO and then waits for the
// socket: without a FIN it would wait until drain_timeout, and every APPEND in
// progress would make a switch abort.
func TestHalfCloseEndsTLSAndTCP(t *testing.T) {
	web := httptest.NewTLSServer(nil) // for its certificate
	t.Cleanup(web.Close)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		raw, err := listener.Accept()
		if err != nil {
			return
		}
		defer func() { _ = raw.Close() }()
		conn := tls.Server(raw, &tls.Config{Certificates: web.TLS.Certificates})
		_, _ = io.Copy(io.Discard, conn) // until close_notify
		_, _ = io.WriteString(conn, "x NO cut off\r\n")
		_, _ = raw.Read(make([]byte, 1)) // until FIN
	}()
	backend, err := tls.Dial("tcp", listener.Addr().String(), &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // a test
	if err != nil {
		t.Fatal(err)
	}
	near, far := net.Pipe()
	heard := make(chan string, 1)
	go func() {
		p, _ := io.ReadAll(far)
		heard <- string(p)
	}()
	revoked, done := make(chan struct{}), make(chan Result, 1)
	Start(Config{
		Client: near, Backend: backend, Tracker: insideLiteral{}, Revoked: revoked, EOFProves: true,
		Drain: 5 * time.Second, Left: func(Result) {}, Done: func(r Result) { done <- r },
	})
	close(revoked)
	if r := <-done; !r.Proven || r.Cause != Revoked {
		t.Errorf("ended %+v, want proof by the backend's end", r)
	}
	if got := <-heard; got != "x NO cut off\r\n" {
		t.Errorf("the client heard %q", got)
	}
}

// oneLine follows a session whose commands are lines.
type oneLine struct {
	insideLiteral
	begun bool
}

func (o *oneLine) Up(p []byte) error {
	o.begun = !bytes.HasSuffix(p, []byte("\n"))
	return nil
}
func (o *oneLine) Midway() bool { return o.begun }
func (o *oneLine) Farewell() []byte {
	if o.begun {
		return nil
	}
	return []byte("bye\n")
}

// A client that is inside a command when its role is moved may finish it, and
// nothing behind it: the backend could not prove its end in the middle (Dovecot
// never, Cyrus with a NO to what the client was doing).
func TestCommandInProgressIsFinished(t *testing.T) {
	for _, c := range []struct {
		name  string
		cause Cause
		want  string
	}{
		{"role moves", Revoked, "APPEND half and half\nbye\n"},
		{"kicked", Kicked, "APPEND half"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				client, near := net.Pipe()
				back, far := net.Pipe()
				revoked, done := make(chan struct{}), make(chan Result, 1)
				s := Start(Config{
					Client: near, Backend: back, Tracker: &oneLine{}, Revoked: revoked, Drain: 9 * time.Second,
					Left: func(Result) {}, Done: func(r Result) { done <- r },
				})
				heard := make(chan string, 1)
				go func() {
					p := make([]byte, 100)
					all := ""
					for !strings.HasSuffix(all, "bye\n") {
						n, err := far.Read(p)
						if all += string(p[:n]); err != nil {
							break
						}
					}
					_ = far.Close()
					heard <- all
				}()
				go func() { _, _ = io.Copy(io.Discard, client) }()
				_, _ = io.WriteString(client, "APPEND half")
				synctest.Wait()
				if c.cause == Revoked {
					close(revoked)
				} else {
					s.End(c.cause)
				}
				synctest.Wait()
				_, _ = io.WriteString(client, " and half\n")
				synctest.Wait()
				go func() { _, _ = io.WriteString(client, "APPEND more\n") }()
				if r := <-done; r.Cause != c.cause {
					t.Errorf("ended %+v", r)
				}
				if got := <-heard; got != c.want {
					t.Errorf("the backend heard %q, want %q", got, c.want)
				}
				_ = client.Close()
			})
		})
	}
}

// Who does not finish is cut off in time.
func TestCommandInProgressIsNotWaitedForForEver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, near := net.Pipe()
		back, far := net.Pipe()
		revoked, done := make(chan struct{}), make(chan Result, 1)
		Start(Config{
			Client: near, Backend: back, Tracker: &oneLine{}, Revoked: revoked, Drain: 9 * time.Second,
			Left: func(Result) {}, Done: func(r Result) { done <- r },
		})
		go func() { _, _ = io.Copy(io.Discard, far) }()
		go func() { _, _ = io.Copy(io.Discard, client) }()
		_, _ = io.WriteString(client, "APPEND half")
		began := time.Now()
		close(revoked)
		<-done
		if took := time.Since(began); took > 9*time.Second+lingerTimeout {
			t.Errorf("ended after %v", took)
		}
		_ = client.Close()
	})
}
