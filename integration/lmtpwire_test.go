package integration

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"
)

// lmtp is an LMTP client without an opinion (RFC 2033): it says what it is told
// and returns every reply as it came. Like wire it never fails a test by itself.
type lmtp struct{ *wire }

// reply is one reply, its lines joined by newlines and without their codes.
type reply struct {
	code int // 0: none came
	text string
}

func (r reply) String() string { return fmt.Sprintf("%d %s", r.code, r.text) }

// accepted says that the server has taken responsibility.
func (r reply) accepted() bool { return r.code/100 == 2 }

// deferred says that a client should come again: the server said so, or
// nothing at all.
func (r reply) deferred() bool { return r.code == 0 || r.code/100 == 4 }

// lmtpLimit is how long one reply may take, where a test says nothing else:
// longer than any hold, shorter than a test.
const lmtpLimit = 40 * time.Second

// dialLMTP connects to host:port or unix:path and gets as far as LHLO.
func dialLMTP(address string) (*lmtp, error) {
	l, err := greetedLMTP(address)
	if err != nil {
		return nil, err
	}
	if r, err := l.command(lmtpLimit, "LHLO client.test"); err != nil || r.code != 250 {
		l.Close()
		return nil, fmt.Errorf("LHLO: %v %w", r, errOr(err, errRefused))
	}
	return l, nil
}

// greetedLMTP connects and reads the greeting.
func greetedLMTP(address string) (*lmtp, error) {
	network := "tcp"
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, address = "unix", path
	}
	conn, err := net.DialTimeout(network, address, 5*time.Second)
	if err != nil {
		return nil, err
	}
	l := &lmtp{&wire{Conn: conn, r: bufio.NewReader(conn)}}
	if r, err := l.reply(lmtpLimit); err != nil || r.code != 220 {
		l.Close()
		return nil, fmt.Errorf("greeting: %v %w", r, errOr(err, errRefused))
	}
	return l, nil
}

func errOr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

// reply reads one reply (RFC 5321 §4.2.1).
func (l *lmtp) reply(limit time.Duration) (reply, error) {
	var lines []string
	deadline := time.Now().Add(limit)
	for {
		line, err := l.line(time.Until(deadline))
		if err != nil {
			return reply{}, fmt.Errorf("waiting for a reply: %w\n%s", err, l.transcript())
		}
		code, err := strconv.Atoi(line[:min(3, len(line))])
		if err != nil || code < 200 || code > 599 || len(line) > 3 && line[3] != ' ' && line[3] != '-' {
			return reply{}, fmt.Errorf("no reply: %q\n%s", line, l.transcript())
		}
		lines = append(lines, line[min(4, len(line)):])
		if len(line) == 3 || line[3] == ' ' {
			return reply{code, strings.Join(lines, "\n")}, nil
		}
	}
}

// replies reads n replies.
func (l *lmtp) replies(limit time.Duration, n int) ([]reply, error) {
	var all []reply
	for range n {
		r, err := l.reply(limit)
		if err != nil {
			return all, err
		}
		all = append(all, r)
	}
	return all, nil
}

func (l *lmtp) command(limit time.Duration, format string, args ...any) (reply, error) {
	if err := l.say(format, args...); err != nil {
		return reply{}, err
	}
	return l.reply(limit)
}

// silent says that nothing unread has come after a NOOP was answered: the
// server has said exactly as much as was read.
func (l *lmtp) silent() error {
	r, err := l.command(lmtpLimit, "NOOP")
	switch {
	case err != nil:
		return err
	case r.code != 250:
		return fmt.Errorf("NOOP: %v\n%s", r, l.transcript())
	}
	text, err := l.line(100 * time.Millisecond)
	if timeout, ok := err.(net.Error); ok && timeout.Timeout() && text == "" {
		return nil
	}
	return fmt.Errorf("one reply too many: %q %v\n%s", text, err, l.transcript())
}

// envelope sends MAIL and the RCPTs in one write (RFC 2920) and returns each
// recipient's reply.
func (l *lmtp) envelope(from string, rcpts []string) ([]reply, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "MAIL FROM:<%s>", from)
	for _, rcpt := range rcpts {
		fmt.Fprintf(&b, "\r\nRCPT TO:<%s>", rcpt)
	}
	if err := l.say("%s", b.String()); err != nil {
		return nil, err
	}
	said, err := l.replies(lmtpLimit, 1+len(rcpts))
	switch {
	case err != nil:
		return said[min(1, len(said)):], err
	case said[0].code != 250:
		return nil, fmt.Errorf("MAIL: %v: %w", said[0], errRefused)
	}
	return said[1:], nil
}

// deliver runs one transaction and returns the last reply about each
// recipient, in their order. After an error the connection is of no use any
// more, and who got no reply has the zero one.
func (l *lmtp) deliver(from string, rcpts []string, message string) ([]reply, error) {
	outcome := make([]reply, len(rcpts))
	said, err := l.envelope(from, rcpts)
	copy(outcome, said)
	var open []int // indices of those whom the message is for
	for i, r := range outcome {
		if r.accepted() {
			open = append(open, i)
			outcome[i] = reply{}
		}
	}
	if err != nil {
		return outcome, err
	}
	if len(open) == 0 {
		_, err := l.command(lmtpLimit, "RSET")
		return outcome, err
	}
	if r, err := l.command(lmtpLimit, "DATA"); err != nil || r.code != 354 {
		for _, i := range open {
			outcome[i] = r
		}
		return outcome, err
	}
	if _, err := io.WriteString(l, stuffed(message)+".\r\n"); err != nil {
		return outcome, err
	}
	said, err = l.replies(lmtpLimit, len(open))
	for i, r := range said {
		outcome[open[i]] = r
	}
	return outcome, err
}

// stuffed doubles the dots that begin lines (RFC 5321 §4.5.2).
func stuffed(message string) string {
	message = strings.ReplaceAll(message, "\r\n.", "\r\n..")
	if strings.HasPrefix(message, ".") {
		message = "." + message
	}
	return message
}

// mustDialLMTP is dialLMTP for a test's own goroutine.
func mustDialLMTP(t testing.TB, address string) *lmtp {
	t.Helper()
	l, err := dialLMTP(address)
	must(t, err)
	l.keep(t)
	return l
}
