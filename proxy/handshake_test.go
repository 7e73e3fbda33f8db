package proxy

import (
	"crypto/tls"
	"net"
	"runtime"
	"testing"
	"time"

	"go.uber.org/zap"
)

// halfHello sends the first half of a TLS ClientHello.
func halfHello(t *testing.T, c net.Conn) {
	t.Helper()
	near, far := net.Pipe()
	go func() {
		_ = tls.Client(near, &tls.Config{ServerName: "localhost"}).Handshake()
		_ = near.Close()
	}()
	hello := make([]byte, 4096)
	n, err := far.Read(hello)
	if err != nil {
		t.Fatal(err)
	}
	_ = far.Close()
	if _, err := c.Write(hello[:n/2]); err != nil {
		t.Fatal(err)
	}
}

// Strangers that begin a handshake and stop must not keep others from theirs.
func TestHalfHellosDoNotBlockOthers(t *testing.T) {
	s := imapSite(t, map[string]string{"connections": "1000"})
	for range 8 * runtime.GOMAXPROCS(0) {
		c := s.dial(t)
		halfHello(t, c)
		defer func() { _ = c.Close() }()
	}
	secured := tls.Client(s.dial(t), &tls.Config{RootCAs: testRoots, ServerName: "localhost"})
	_ = secured.SetDeadline(time.Now().Add(2 * time.Second))
	if err := secured.Handshake(); err != nil {
		t.Fatalf("a good client's handshake: %v", err)
	}
}

// A handshake that comes to nothing has its one line in the log; who only
// connects and goes has none.
func TestFailedHandshakeIsLogged(t *testing.T) {
	s := imapSite(t, map[string]string{"limits": "preauth=300ms"})
	_ = s.dial(t).Close()
	halfHello(t, s.dial(t))
	if _, err := s.dial(t).Write([]byte("a LOGIN alice secret\r\n")); err != nil {
		t.Fatal(err)
	}
	refused := func(reason string) int {
		return s.logs.FilterLevelExact(zap.InfoLevel).FilterMessage("login refused").FilterField(zap.String("reason", reason)).Len()
	}
	if err := s.waitFor(func() bool { return refused("timed_out") == 1 && refused("malformed") == 1 }); err != nil {
		t.Fatalf("%v\n%s", err, s.logged())
	}
	if n := s.logs.FilterLevelExact(zap.InfoLevel).Len(); n != 2 {
		t.Errorf("%d lines, want 2:\n%s", n, s.logged())
	}
}
