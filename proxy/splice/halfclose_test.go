package splice

import (
	"crypto/tls"
	"io"
	"net"
	"net/http/httptest"
	"testing"
	"time"
)

// insideLiteral follows a session that is cut off inside a command: there are
// no words to say, only a half-close.
type insideLiteral struct{}

func (insideLiteral) Up([]byte) error        { return nil }
func (insideLiteral) Down(p []byte) []byte   { return p }
func (insideLiteral) Farewell() []byte       { return nil }
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
