//go:build bench

package integration

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// benchLoad is one kind of mail.
type benchLoad struct {
	name   string
	octets int // of a message
	rcpts  int
}

// message is complete, so that nobody on its way has to add what is missing,
// and ends with the final dot.
func (l benchLoad) message() []byte {
	var b bytes.Buffer
	b.WriteString("Subject: A message\r\nMessage-ID: <1@client.test>\r\nDate: Mon, 23 Nov 2026 12:00:00 +0000\r\n" +
		"From: sender@client.test\r\nTo: undisclosed-recipients:;\r\nMIME-Version: 1.0\r\nContent-Type: text/plain\r\n\r\n")
	line := strings.Repeat("ordinary text ", 5) + "here.\r\n"
	for b.Len()+len(line) <= l.octets {
		b.WriteString(line)
	}
	b.WriteString(".\r\n")
	return b.Bytes()
}

// send delivers copies of message until the deadline, over all connections,
// and returns how long each took. Anything but a 2xx for every recipient is an
// error.
func (l benchLoad) send(address string, message []byte, deadline time.Time) ([]time.Duration, error) {
	var (
		senders sync.WaitGroup
		took    [benchConnections][]time.Duration
		errs    [benchConnections]error
	)
	for i := range benchConnections {
		senders.Go(func() { took[i], errs[i] = l.sendOver(address, message, i, deadline) })
	}
	senders.Wait()
	var all []time.Duration
	for i, err := range errs {
		if err != nil {
			return nil, err
		}
		all = append(all, took[i]...)
	}
	return all, nil
}

// sendOver is one connection of an MTA: like Postfix it sends everything up to
// DATA at once.
func (l benchLoad) sendOver(address string, message []byte, first int, deadline time.Time) ([]time.Duration, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	conn.SetDeadline(deadline.Add(30 * time.Second))
	r := bufio.NewReader(conn)
	if _, err := expect(r, 220); err != nil {
		return nil, err
	}
	if _, err := io.WriteString(conn, "LHLO client.test\r\n"); err != nil {
		return nil, err
	}
	if _, err := expect(r, 250); err != nil {
		return nil, err
	}
	var took []time.Duration
	var envelope []byte
	for user := first; time.Now().Before(deadline); user += benchConnections {
		began := time.Now()
		envelope = append(envelope[:0], "MAIL FROM:<sender@client.test>\r\n"...)
		for i := range l.rcpts {
			envelope = append(append(append(envelope, "RCPT TO:<"...), benchUsers[(user+i)%len(benchUsers)]...), "@example.org>\r\n"...)
		}
		if err := l.transaction(conn, r, append(envelope, "DATA\r\n"...), message); err != nil {
			return nil, fmt.Errorf("message %d: %w", len(took)+1, err)
		}
		took = append(took, time.Since(began))
	}
	if _, err := io.WriteString(conn, "QUIT\r\n"); err != nil {
		return nil, err
	}
	_, err = expect(r, 221)
	return took, err
}

func (l benchLoad) transaction(conn net.Conn, r *bufio.Reader, envelope, message []byte) error {
	if _, err := conn.Write(envelope); err != nil {
		return err
	}
	for range 1 + l.rcpts {
		if _, err := expect(r, 250); err != nil {
			return err
		}
	}
	if _, err := expect(r, 354); err != nil {
		return err
	}
	if _, err := conn.Write(message); err != nil {
		return err
	}
	for range l.rcpts {
		text, err := expect(r, 250)
		if err != nil {
			return err
		}
		// The sink says how much it got; a proxy may add trace fields only.
		if octets, ok := strings.CutPrefix(text, sinkSaved); ok {
			n, err := strconv.Atoi(strings.TrimSpace(octets))
			if want := len(message) - len(".\r\n"); err != nil || n < want || n > want+1000 {
				return fmt.Errorf("a message of %d octets arrived with %q", want, octets)
			}
		}
	}
	return nil
}

// expect reads a reply, which must have that code, and returns its last line.
func expect(r *bufio.Reader, code int) (string, error) {
	for {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return "", err
		}
		if len(line) < 4 || string(line[:3]) != strconv.Itoa(code) {
			return "", fmt.Errorf("expected %d, got %q", code, line)
		}
		if line[3] != '-' {
			return string(line[4:]), nil
		}
	}
}

// sinkVariable holds the address where this test binary, started once more, is
// to be the sink: its cost must not be counted with the clients'.
const sinkVariable = "POSTHOUSE_BENCH_SINK"

func init() {
	if address := os.Getenv(sinkVariable); address != "" {
		fmt.Fprintln(os.Stderr, serveSink(address))
		os.Exit(1)
	}
}

// startSink starts an LMTP server that forgets all mail and returns its host.
func startSink(t *testing.T) string {
	t.Helper()
	host, dir := nextHost(), newDir(t, "sink-")
	self, err := os.Executable()
	must(t, err)
	// The directory stands in the command line to mark the process as the lab's.
	d := startDaemon(t, "sink", dir, "env", sinkVariable+"="+host+":24", self, filepath.Join(dir, "sink"))
	t.Cleanup(d.kill)
	d.listening(t, host+":24")
	return host
}

func serveSink(address string) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			s := sink{r: bufio.NewReaderSize(conn, 64<<10), w: bufio.NewWriter(conn)}
			s.serve()
		}()
	}
}

// sink is a connection of the sink. It offers what Dovecot's LMTP offers to
// those whom it trusts.
type sink struct {
	r     *bufio.Reader
	w     *bufio.Writer
	rcpts int
	sum   int // octets of the chunks so far
}

// sinkSaved is the sink's word on a message, before its size in octets.
const sinkSaved = "2.0.0 Saved, octets: "

func (s *sink) say(line string) {
	s.w.WriteString(line)
	s.w.WriteString("\r\n")
}

func (s *sink) serve() error {
	s.say("220 sink.test ready")
	for {
		if s.r.Buffered() == 0 {
			if err := s.w.Flush(); err != nil {
				return err
			}
		}
		line, err := s.r.ReadSlice('\n')
		if err != nil {
			return err
		}
		verb, argument, _ := strings.Cut(strings.TrimRight(string(line), "\r\n"), " ")
		switch strings.ToUpper(verb) {
		case "LHLO":
			s.say("250-sink.test\r\n250-8BITMIME\r\n250-CHUNKING\r\n250-ENHANCEDSTATUSCODES\r\n250-PIPELINING\r\n" +
				"250 XCLIENT ADDR PORT PROTO HELO LOGIN SESSION TTL TIMEOUT")
		case "XCLIENT":
			s.say("220 sink.test ready")
		case "MAIL":
			s.rcpts, s.sum = 0, 0
			s.say("250 2.1.0 OK")
		case "RCPT":
			s.rcpts++
			s.say("250 2.1.5 OK")
		case "DATA":
			s.say("354 OK")
			err = s.data()
		case "BDAT":
			err = s.bdat(argument)
		case "QUIT":
			s.say("221 2.0.0 Bye")
			return s.w.Flush()
		default: // RSET, NOOP
			s.say("250 2.0.0 OK")
		}
		if err != nil {
			return err
		}
	}
}

func (s *sink) data() error {
	if err := s.w.Flush(); err != nil {
		return err
	}
	octets := 0
	for {
		line, err := s.r.ReadSlice('\n')
		if err != nil {
			return err
		}
		if string(line) == ".\r\n" {
			s.saved(octets)
			return nil
		}
		octets += len(line)
	}
}

func (s *sink) bdat(argument string) error {
	digits, last, _ := strings.Cut(argument, " ")
	n, err := strconv.Atoi(digits)
	if err != nil {
		return err
	}
	if _, err := s.r.Discard(n); err != nil {
		return err
	}
	s.sum += n
	if strings.EqualFold(last, "LAST") {
		s.saved(s.sum)
	} else {
		s.say("250 2.0.0 OK")
	}
	return nil
}

func (s *sink) saved(octets int) {
	for range s.rcpts {
		s.say("250 " + sinkSaved + strconv.Itoa(octets))
	}
}
