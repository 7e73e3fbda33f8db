package integration

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// preauth is how long a client may take in these tests to log in.
const preauth = 2 * time.Second

// attack is one bad client.
type attack struct {
	name string
	door string
	want string // regexp for what it is told; "" where nothing can be said
	play func(c net.Conn, heard *buffer) error
}

var attacks = []attack{
	{"a 100 MB line", "imap/starttls", `(?m)^(\* BYE|\S+ BAD)`, endless("a LOGIN ", "x", 100<<20)},
	{"a 100 MB line", "pop3/starttls", `(?m)^-ERR`, endless("USER ", "x", 100<<20)},
	{"a 100 MB line", "sieve/starttls", `(?m)^(NO|BYE)`, endless("AUTHENTICATE \"PLAIN\" \"", "x", 100<<20)},
	{"100 MB of lines", "imap/starttls", `(?m)^(\* BYE|\S+ BAD)`, endless("", "a NONSENSE\r\n", 100<<20)},
	{"100 MB of lines", "pop3/starttls", `(?m)^-ERR`, endless("", "NONSENSE\r\n", 100<<20)},
	{"100 MB of lines", "sieve/starttls", `(?m)^(NO|BYE)`, endless("", "NONSENSE\r\n", 100<<20)},
	{"a 2 GB literal", "imap/starttls", `(?m)^(\* BYE|\* BAD|a (BAD|NO))`, once("a LOGIN {2147483648}\r\n")},
	{"a 2 GB non-synchronizing literal", "imap/starttls", `(?m)^(\* BYE|a BAD)`, endless("a LOGIN {2147483648+}\r\n", "x", 100<<20)},
	{"a 2 GB literal", "sieve/starttls", `(?m)^(NO|BYE)`, endless("AUTHENTICATE \"PLAIN\" {2147483648+}\r\n", "x", 100<<20)},
	{"a literal beyond int64", "imap/starttls", `(?m)^(\* BYE|\* BAD|a (BAD|NO))`, once("a LOGIN {99999999999999999999}\r\n")},
	{"NUL", "imap/starttls", `(?m)^(\* BAD|a BAD|\* BYE)`, once("a LOGIN u\x000001 secret\r\n")},
	{"NUL", "pop3/starttls", `(?m)^-ERR`, once("USER u\x000001\r\n")},
	{"NUL", "sieve/starttls", `(?m)^(NO|BYE)`, once("NOOP \"\x00\"\r\n")},
	{"8-bit", "imap/starttls", `(?m)^(\* BAD|a BAD|\* BYE)`, once("a \xff\xfe\x80\r\n")},
	{"8-bit", "pop3/starttls", `(?m)^-ERR`, once("\xff\xfe\x80\r\n")},
	{"8-bit", "sieve/starttls", `(?m)^(NO|BYE)`, once("\xff\xfe\x80\r\n")},
	{"half a TLS hello", "imap/implicit", "", halfHello("")},
	{"half a TLS hello", "pop3/implicit", "", halfHello("")},
	{"half a TLS hello", "sieve/implicit", "", halfHello("")},
	{"half a TLS hello", "imap/starttls", `(?m)^a OK`, halfHello("a STARTTLS\r\n")},
	{"no TLS at all", "imap/implicit", "", once("a LOGIN u0001 secret\r\n")},
	{"one byte at a time", "imap/starttls", `(?m)^\* BYE`, dripping("a LOGIN u0001 secret of many octets, one by one")},
	{"one byte at a time", "pop3/starttls", `(?m)^-ERR`, dripping("USER u0001 of many octets, one by one, for long")},
	{"one byte at a time", "sieve/starttls", `(?m)^(NO|BYE)`, dripping(`AUTHENTICATE "PLAIN" "of many octets, one"`)},
	{"one byte at a time", "imap/implicit", "", dripping("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 and so on and so on and so on")},
	{"silence", "imap/starttls", `(?m)^\* BYE`, once("")},
}

// TestHostile: every bad client is answered in its protocol's words, its
// connection is closed in time, one line is logged about it, and all of them
// together cost posthouse little memory.
func TestHostile(t *testing.T) {
	t.Parallel()
	s := deadSite(t)
	s.limits = "auth_failure_delay: 100ms, preauth_timeout: " + preauth.String()
	s.fast = true // the race detector's own memory is not what is bounded here
	p := startFrontend(t, s)
	before := p.peakMemory(t)
	t.Run("attack", func(t *testing.T) {
		for _, a := range attacks {
			t.Run(a.door+"/"+a.name, func(t *testing.T) {
				t.Parallel()
				a.run(t, p)
			})
		}
	})
	if grown := p.peakMemory(t) - before; grown > 32<<20 {
		t.Errorf("posthouse grew by %d MB", grown>>20)
	}
}

// run plays the attack from an address of its own, by which the log is searched.
func (a attack) run(t *testing.T, p *posthouse) {
	from := nextHost()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}, Timeout: 5 * time.Second}
	conn, err := dialer.Dial("tcp", p.service().at[a.door])
	must(t, err)
	defer conn.Close()
	began := time.Now()
	heard, end := &buffer{}, make(chan error, 1)
	go func() {
		conn.SetReadDeadline(began.Add(preauth + 20*time.Second))
		_, err := io.Copy(heard, conn)
		end <- err
	}()
	if err := a.play(conn, heard); err != nil && !closedByPeer(err) {
		t.Errorf("while attacking: %v", err)
	}
	ended := <-end
	took, answer := time.Since(began), heard.String()
	if took > preauth+6*time.Second {
		t.Errorf("closed after %v, the limit is %v", took, preauth)
	}
	if errors.Is(ended, os.ErrDeadlineExceeded) {
		t.Errorf("not closed; heard %q", tail(answer, 5))
	}
	if a.want != "" && !regexp.MustCompile(a.want).MatchString(answer) {
		t.Errorf("heard %q, want %s", answer[:min(len(answer), 500)], a.want)
	}
	if !becomes(5*time.Second, func() bool { return len(p.lines(from)) > 0 }) || len(p.lines(from)) > 1 {
		t.Errorf("%d log lines about it, want one:\n%s", len(p.lines(from)), strings.Join(p.lines(from), ""))
	}
}

func closedByPeer(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET) || errors.Is(err, net.ErrClosed)
}

// once sends text and then nothing more.
func once(text string) func(net.Conn, *buffer) error {
	return func(c net.Conn, _ *buffer) error {
		_, err := io.WriteString(c, text)
		return err
	}
}

// endless sends start and then n octets of filler, as fast as they are taken.
func endless(start, filler string, n int) func(net.Conn, *buffer) error {
	return func(c net.Conn, _ *buffer) error {
		c.SetWriteDeadline(time.Now().Add(preauth + 6*time.Second))
		block := bytes.Repeat([]byte(filler), 64<<10/len(filler))
		if _, err := io.WriteString(c, start); err != nil {
			return err
		}
		for sent := 0; sent < n; sent += len(block) {
			if _, err := c.Write(block); errors.Is(err, os.ErrDeadlineExceeded) {
				return nil // it is not read any more; closing is judged elsewhere
			} else if err != nil {
				return err
			}
		}
		return nil
	}
}

// dripping sends text one octet every 200 ms, so that no single read is slow.
func dripping(text string) func(net.Conn, *buffer) error {
	return func(c net.Conn, _ *buffer) error {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for i := range len(text) {
			if _, err := io.WriteString(c, text[i:i+1]); err != nil {
				return err
			}
			<-tick.C
		}
		return nil
	}
}

// halfHello sends start and, once that is answered if there is any, the first
// half of a real TLS ClientHello.
func halfHello(start string) func(net.Conn, *buffer) error {
	return func(c net.Conn, heard *buffer) error {
		hello, err := clientHello()
		if err != nil {
			return err
		}
		if _, err := io.WriteString(c, start); err != nil {
			return err
		}
		if start != "" { // pipelined, it would be refused
			becomes(preauth, func() bool { return strings.Contains(heard.String(), "a OK") })
		}
		_, err = c.Write(hello[:len(hello)/2])
		return err
	}
}

// clientHello records what crypto/tls would send first.
func clientHello() ([]byte, error) {
	near, far := net.Pipe()
	defer far.Close()
	go func() {
		tls.Client(near, &tls.Config{ServerName: "mail.test"}).Handshake()
		near.Close()
	}()
	raw := make([]byte, 4096)
	n, err := far.Read(raw)
	return raw[:n], err
}

// TestHalfHellosStarveNobody: however many strangers begin a handshake and
// stop, somebody else is greeted at once.
func TestHalfHellosStarveNobody(t *testing.T) {
	t.Parallel()
	p := startFrontend(t, deadSite(t))
	hello, err := clientHello()
	must(t, err)
	for range 100 {
		conn, err := net.DialTimeout("tcp", p.service().at["imap/implicit"], 5*time.Second)
		must(t, err)
		defer conn.Close()
		_, err = conn.Write(hello[:len(hello)/2])
		must(t, err)
	}
	w, err := dialWire(p.service().at["imap/implicit"], lab.ca.client(p.name))
	must(t, err)
	_, _, err = w.keep(t).until(5*time.Second, "* OK")
	must(t, err)
}

// peakMemory is the process's peak resident set in octets.
func (p *posthouse) peakMemory(t testing.TB) int {
	t.Helper()
	for line := range strings.Lines(readFile(t, fmt.Sprintf("/proc/%d/status", p.pid()))) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == "VmHWM:" {
			kb, err := strconv.Atoi(fields[1])
			must(t, err)
			return kb << 10
		}
	}
	t.Fatal("no VmHWM in /proc")
	return 0
}
