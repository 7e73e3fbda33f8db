package splice

import (
	"bytes"
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"
)

// talker follows a protocol of one word: LOGOUT is answered OK.
type talker struct{ proven bool }

func (t *talker) Up([]byte) error { return nil }
func (t *talker) Down(p []byte) []byte {
	t.proven = t.proven || bytes.HasSuffix(p, []byte("OK\r\n"))
	return p
}
func (t *talker) Farewell() []byte             { return []byte("LOGOUT\r\n") }
func (t *talker) Midway() bool                 { return false }
func (t *talker) Leaving() bool                { return false }
func (t *talker) Nudge() []byte                { return nil }
func (t *talker) Proven() bool                 { return t.proven }
func (t *talker) Ended(bool, bool, bool) bool  { return t.proven }
func (t *talker) LastWords(cause Cause) []byte { return []byte("BYE " + string(cause) + "\r\n") }

// pair is a TCP connection of loopback: ours and the other side's.
func pair(t testing.TB) (ours, theirs *net.TCPConn) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	there, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	here, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = here.Close(); _ = there.Close() })
	_ = there.SetDeadline(time.Now().Add(20 * time.Second))
	return here.(*net.TCPConn), there.(*net.TCPConn)
}

// start splices and returns both far ends and where the result will be.
func start(t testing.TB, drain time.Duration) (s *Splice, client, backend *net.TCPConn, left chan Result) {
	t.Helper()
	ourClient, client := pair(t)
	ourBackend, backend := pair(t)
	left = make(chan Result, 1)
	done := make(chan struct{})
	s = Start(Config{
		Client: ourClient, Backend: ourBackend, Tracker: &talker{}, Drain: drain,
		Left: func(r Result) { left <- r }, Done: func(Result) { close(done) },
	})
	t.Cleanup(func() {
		_, _ = client.Close(), backend.Close()
		s.End(Kicked)
		<-done
	})
	return s, client, backend, left
}

// answer plays the backend: it sends first, then answers LOGOUT.
func answer(backend net.Conn, first string) {
	_, _ = io.WriteString(backend, first)
	heard := make([]byte, len("LOGOUT\r\n"))
	if _, err := io.ReadFull(backend, heard); err == nil && string(heard) == "LOGOUT\r\n" {
		_, _ = io.WriteString(backend, "OK\r\n")
	}
}

// A client that goes on sending while its session ends must still get the last
// words: a plain close over unread input would answer with a reset.
func TestLastWordsSurviveUnreadInput(t *testing.T) {
	s, client, backend, left := start(t, 10*time.Second)
	s.End(Kicked)
	go answer(backend, "")
	if r := <-left; !r.Proven || r.Cause != Kicked {
		t.Errorf("%+v", r)
	}
	_, _ = client.Write([]byte(strings.Repeat("x", 100_000)))
	heard, err := io.ReadAll(client)
	if err != nil || !strings.HasSuffix(string(heard), "BYE kicked\r\n") {
		t.Errorf("heard %q, %v", heard, err)
	}
}

// A client that reads nothing does not keep the backend's proof from counting.
func TestProofThoughTheClientReadsNothing(t *testing.T) {
	s, _, backend, left := start(t, 2*time.Second)
	go answer(backend, strings.Repeat("x", 16<<20)) // more than the sockets hold
	s.End(Revoked)
	if r := <-left; !r.Proven {
		t.Errorf("%+v", r)
	}
}

// A backend that does not answer leaves no proof, and is reset.
func TestNoAnswerNoProof(t *testing.T) {
	s, _, backend, left := start(t, 50*time.Millisecond)
	s.End(ShuttingDown)
	if r := <-left; r.Proven {
		t.Errorf("%+v", r)
	}
	if _, err := io.ReadAll(backend); err == nil {
		t.Error("the backend found an orderly end")
	}
}

// An idle session holds no large buffer.
func TestIdleMemory(t *testing.T) {
	const sessions = 200
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for range sessions {
		start(t, time.Second)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	each := (after.HeapAlloc - before.HeapAlloc) / sessions
	if each > 32<<10 {
		t.Errorf("%d octets of heap per idle session", each)
	}
	t.Logf("%d octets of heap per idle session", each)
}
