package proxy

import (
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"net"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/posthouse/posthouse/backendpool"
)

// lmtpConn is a connection to a backend's LMTP service, between its login and
// its end; it serves one transaction at a time. A Reuse keeps it in between.
type lmtpConn struct {
	*lineConn
	keywords map[string]string // what the backend offers; the value is its parameters
	// told is the last XCLIENT command that the backend has taken, and listens
	// what it then offered to take.
	told, listens string
}

// lmtpWords are what opens a conversation with a backend's LMTP service.
type lmtpWords struct{ hostname string }

// meet reads the greeting and says LHLO, under TLS if the configuration demands
// it. The tokens are LHLO's lines: a keyword and its parameters.
func (w lmtpWords) meet(b *lineConn) ([]string, error) {
	if r, err := readReply(b); err != nil {
		return nil, err
	} else if r.code != 220 {
		return nil, failf(Unavailable, "greeting", "no LMTP greeting: %s", r)
	}
	announced, err := w.hello(b)
	if err != nil || !b.mustStartTLS {
		return announced, err
	}
	r, err := ask(b, "STARTTLS")
	if err != nil {
		return nil, err
	}
	if r.code != 220 {
		return nil, failf(Misconfigured, "STARTTLS", "the backend refuses TLS: %s", r)
	}
	if err := b.startTLS(); err != nil {
		return nil, err
	}
	return w.hello(b) // RFC 3207 §4.2: what was said before does not count
}

// hello says LHLO (RFC 2033 §4.1) and returns the lines after the first.
func (w lmtpWords) hello(b *lineConn) ([]string, error) {
	r, err := ask(b, "LHLO "+w.hostname)
	if err != nil {
		return nil, err
	}
	if r.code != 250 {
		return nil, failf(Misconfigured, "LHLO", "the backend does not speak LMTP: %s", r)
	}
	return r.lines[1:], nil
}

func (lmtpWords) partingWords() string { return "QUIT" }

// keywords sorts LHLO's lines by keyword, in upper case.
func keywords(announced []string) map[string]string {
	k := make(map[string]string, len(announced))
	for _, line := range announced {
		keyword, parameters, _ := strings.Cut(line, " ")
		k[strings.ToUpper(keyword)] = parameters
	}
	return k
}

// openLMTP connects to a backend's LMTP service and logs in where the backend
// wants it: Cyrus takes mail over TCP only from who has authenticated, unless
// lmtpd runs with -a.
func (s *Server) openLMTP(ctx context.Context, backend *backendpool.Backend) (*lmtpConn, error) {
	b, announced, err := s.reach(ctx, lmtpWords{s.options.Hostname}, "lmtp", backend)
	if err != nil {
		return nil, err
	}
	s.offers.learn("lmtp", backend.Name, announced)
	conn := &lmtpConn{lineConn: b, keywords: keywords(announced)}
	if !has(strings.Fields(conn.keywords["AUTH"]), "PLAIN") || backend.User == "" {
		return conn, nil
	}
	stop := context.AfterFunc(ctx, func() { b.deadline(time.Unix(1, 0)) })
	defer stop()
	b.deadline(time.Now().Add(s.options.Limits.BackendLoginTimeout))
	r, err := ask(b, "AUTH PLAIN "+base64.StdEncoding.EncodeToString([]byte("\x00"+backend.User+"\x00"+backend.Password())))
	if err == nil && r.code != 235 {
		err = failf(Misconfigured, "AUTH", "the backend refuses login.user %s: %s", backend.User, r)
	}
	if err != nil {
		b.close()
		return nil, ofBackend("log in to "+backend.Name, err)
	}
	return conn, nil
}

// errToldMore: an earlier XCLIENT has told something that this one would leave
// standing. Dovecot overwrites only what is named.
var errToldMore = errors.New("the connection speaks for somebody else")

// introduce tells the backend for whom we ask, if it offers to believe it and
// has not heard it yet. XCLIENT begins the session anew, with a greeting and
// another LHLO. A backend that refuses is not asked again.
func (c *lmtpConn) introduce(s *Server, backend *backendpool.Backend, who clientAttributes) error {
	offered, ok := c.keywords["XCLIENT"]
	if !ok {
		offered = c.listens // once, perhaps
	}
	command := who.xclient(strings.Fields(offered))
	switch {
	case command == c.told:
		return nil
	case !ok:
		return errToldMore
	}
	for attribute := range strings.FieldsSeq(c.told) {
		name, _, _ := strings.Cut(attribute, "=")
		if !strings.Contains(command, " "+name+"=") && name != "XCLIENT" {
			return errToldMore
		}
	}
	r, err := ask(c.lineConn, command)
	if err != nil {
		return err
	}
	if r.code != 220 {
		s.log.Warn("a backend announces XCLIENT and refuses it", zap.String("backend", backend.Name), zap.Stringer("reply", r))
		if c.told != "" {
			return errToldMore
		}
		delete(c.keywords, "XCLIENT")
		return nil
	}
	announced, err := lmtpWords{s.options.Hostname}.hello(c.lineConn)
	if err != nil {
		return err
	}
	c.told, c.listens, c.keywords = command, offered, keywords(announced)
	return nil
}

// has says whether the backend has announced a keyword.
func (c *lmtpConn) has(keyword string) bool {
	_, ok := c.keywords[keyword]
	return ok
}

// socket is the connection below TLS.
func (c *lmtpConn) socket() net.Conn {
	if secured, ok := c.conn.(*tls.Conn); ok {
		return secured.NetConn()
	}
	return c.conn
}

// stirs says whether something has come on a connection that should rest: its
// end, or octets that no command has asked for.
func (c *lmtpConn) stirs() bool {
	conn, ok := c.socket().(syscall.Conn)
	if !ok || c.pipelined() {
		return true
	}
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	var got error
	err = raw.Control(func(fd uintptr) {
		_, _, got = unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
	})
	return err != nil || !errors.Is(got, unix.EAGAIN)
}

// abort closes the connection at once and without a word: under TLS, close_notify
// could wait for a backend that reads nothing.
func (c *lmtpConn) abort() { _ = c.socket().Close() }

// quitTimeout bounds the courtesies at the end of a connection.
const quitTimeout = time.Second

// Close ends a connection that is not in use, with QUIT. It does not wait for
// the reply.
func (c *lmtpConn) Close() error {
	c.deadline(time.Now().Add(quitTimeout))
	_ = c.writeLines(lmtpWords{}.partingWords())
	return c.conn.Close()
}

// ask sends a command and reads its reply.
func ask(b *lineConn, command string) (reply, error) {
	if err := b.writeLines(command); err != nil {
		return reply{}, err
	}
	return readReply(b)
}

const (
	// mostReplyLine bounds a line of a backend's reply: RFC 5321 §4.5.3.1.5
	// allows 512 octets, LHLO's parameters may need more.
	mostReplyLine = 2048
	// mostReplyLines bounds the lines of one reply.
	mostReplyLines = 100
)

// readReply reads one reply with all its lines (RFC 5321 §4.2.1).
func readReply(b *lineConn) (reply, error) {
	var r reply
	for len(r.lines) < mostReplyLines {
		line, err := b.readLine(mostReplyLine)
		if err != nil {
			return reply{}, err
		}
		code, more, text, ok := parseReplyLine(line)
		if !ok || r.code != 0 && code != r.code {
			return reply{}, failf(Unavailable, "read a reply", "no LMTP reply: %q", clip(line))
		}
		r.code, r.lines = code, append(r.lines, text)
		if !more {
			return r, nil
		}
	}
	return reply{}, failf(Unavailable, "read a reply", "more than %d lines", mostReplyLines)
}
