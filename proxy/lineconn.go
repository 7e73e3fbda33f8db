package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"os"
	"time"
)

const (
	// readAhead is the size of the one reader of each side. It bounds what a
	// client can pipeline into our memory during a login.
	readAhead = 4096
	// bodyAhead is that of an MTA's side, from which whole messages come.
	bodyAhead = 32768
	// maxLine bounds a line before the splice, in octets. RFC 9051 §4 suggests
	// 8192 for an IMAP command; a SASL response (OAuth tokens, Kerberos
	// tickets) needs more, and RFC 2449's 255 for POP3 are far too few.
	maxLine = 16384
	// maxLiteral bounds a literal before login (user names, passwords, ID
	// values).
	maxLiteral = 8192
)

// lineConn is one side of a session, from Accept or Dial until the splice or
// Close. It owns the side's only reader: bytes read ahead are delivered once,
// by the next read or to the splice. It is used by one goroutine at a time;
// deadlines and close may come from others.
type lineConn struct {
	conn net.Conn // what is read and written now: the socket or TLS over it
	r    *bufio.Reader

	// wrap starts TLS over the plain connection, as server towards clients,
	// as client towards backends. nil if TLS cannot be started any more.
	wrap func(ctx context.Context, plain net.Conn) (*tls.Conn, error)
	// ctx ends what startTLS waits for.
	ctx context.Context
	// mustStartTLS: the backend's configuration demands STARTTLS.
	mustStartTLS bool

	// provenByWords: only the backend's answer to our last words proves its
	// end, so nothing may be offered that hides words from us.
	provenByWords bool
	// claimed is set before credentials go out to a backend and cleared by
	// its refusal: from then on a session may exist there, and closing the
	// connection does not prove that it has ended.
	claimed bool

	// strikes counts commands that made no sense, of which the client may
	// send mostStrikes.
	strikes, mostStrikes int

	// dead: reading or writing has failed; nothing can be answered any more.
	dead bool
}

func newLineConn(ctx context.Context, conn net.Conn, ahead int) *lineConn {
	return &lineConn{conn: conn, ctx: ctx, r: bufio.NewReaderSize(conn, ahead)}
}

// readLine reads a line of at most max octets and returns it without its line
// end; CRLF and LF both end a line. The slice is the caller's. Over max it
// fails with TooLong, having kept no more than max octets.
func (c *lineConn) readLine(max int) ([]byte, error) {
	var line []byte
	for {
		part, err := c.r.ReadSlice('\n')
		if len(line)+len(part) > max+2 {
			return nil, failf(TooLong, "read a line", "longer than %d octets", max)
		}
		line = append(line, part...)
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil {
			return nil, c.readError(err, len(line) == 0)
		}
		line = line[:len(line)-1]
		if n := len(line); n > 0 && line[n-1] == '\r' {
			line = line[:n-1]
		}
		return line, nil
	}
}

// readLiteral reads exactly n octets, at most maxLiteral.
func (c *lineConn) readLiteral(n int) ([]byte, error) {
	if n > maxLiteral {
		return nil, failf(TooLong, "read a literal", "%d octets, %d allowed before login", n, maxLiteral)
	}
	p := make([]byte, n)
	if _, err := io.ReadFull(c.r, p); err != nil {
		return nil, c.readError(err, false)
	}
	return p, nil
}

// readError turns what a Read said into errClientLeft, TimedOut, or itself.
func (c *lineConn) readError(err error, atBoundary bool) error {
	switch {
	case errors.Is(err, io.EOF) && atBoundary:
		return errClientLeft
	case errors.Is(err, os.ErrDeadlineExceeded):
		return &Error{Reason: TimedOut, Op: "read", Err: err}
	}
	c.dead = true
	return &Error{Op: "read", Err: err}
}

// writeLines sends the parts, each ended by CRLF, in one write.
func (c *lineConn) writeLines(lines ...string) error {
	n := 0
	for _, l := range lines {
		n += len(l) + 2
	}
	p := make([]byte, 0, n)
	for _, l := range lines {
		p = append(append(p, l...), '\r', '\n')
	}
	return c.write(p)
}

func (c *lineConn) write(p []byte) error {
	if _, err := c.conn.Write(p); err != nil {
		c.dead = true
		return &Error{Op: "write", Err: err}
	}
	return nil
}

// strike counts a command that made no sense. It fails with TooMany above
// mostStrikes.
func (c *lineConn) strike() error {
	c.strikes++
	if c.mostStrikes > 0 && c.strikes > c.mostStrikes {
		return failf(TooMany, "read a command", "%d commands made no sense", c.strikes)
	}
	return nil
}

// pipelined says whether bytes lie here that were read ahead.
func (c *lineConn) pipelined() bool { return c.r.Buffered() > 0 }

// secure says whether TLS is on.
func (c *lineConn) secure() bool {
	_, ok := c.conn.(*tls.Conn)
	return ok
}

// startTLS upgrades the connection and returns when the handshake is done, or
// the connection's context or deadline ends. Bytes read ahead before TLS began are
// an attack (response or command injection): it refuses with Pipelined.
func (c *lineConn) startTLS() error {
	if c.pipelined() {
		return failf(Pipelined, "start TLS", "%d octets of plaintext followed the command", c.r.Buffered())
	}
	conn, err := c.wrap(c.ctx, c.conn)
	if err != nil {
		return &Error{Op: "start TLS", Err: err}
	}
	c.conn, c.wrap, c.mustStartTLS = conn, nil, false
	c.r.Reset(conn)
	return nil
}

// deadline bounds all reads and writes from now on.
func (c *lineConn) deadline(t time.Time) {
	_ = c.conn.SetDeadline(t) // fails only on a closed connection, which the next read reports
}

// await bounds all reads and writes from now on, for a wait that the end of the
// connection's context ends too. Whoever ends the context then sets the read
// deadline to the past; this sees to a context that had ended before.
func (c *lineConn) await(t time.Time) {
	c.deadline(t)
	if c.ctx.Err() != nil {
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
	}
}

// watch reads ahead, so that a client that leaves while it waits is noticed: left
// is called then, once. What it says meanwhile stays to be read, and ends the
// watching. The caller calls stop before it reads or sets deadlines again.
func (c *lineConn) watch(left func()) (stop func()) {
	if c.pipelined() {
		return func() {}
	}
	c.await(time.Time{})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if _, err := c.r.Peek(1); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			left()
		}
	}()
	return func() {
		_ = c.conn.SetReadDeadline(time.Unix(1, 0))
		<-ended
	}
}

// ahead takes what was read ahead and not consumed. The lineConn must not be
// read afterwards.
func (c *lineConn) ahead() []byte {
	p, _ := c.r.Peek(c.r.Buffered())
	return bytes.Clone(p)
}

// close closes the connection, under TLS with a close_notify. What a client
// was told last may be lost: see splice.Close.
func (c *lineConn) close() { _ = c.conn.Close() }
