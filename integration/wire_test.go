package integration

import (
	"bufio"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"
)

// wire is a client without an opinion: it writes what it is told and reads
// lines. It never fails a test by itself, so it may be used in any goroutine.
type wire struct {
	net.Conn
	r    *bufio.Reader
	tags int
	bye  bool     // an untagged BYE has come
	log  []string // what was said, for messages; base64 and bodies included
}

// dialWire connects; a nil config means no TLS yet.
func dialWire(address string, config *tls.Config) (*wire, error) {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return nil, err
	}
	if config != nil {
		conn = tls.Client(conn, config)
	}
	return &wire{Conn: conn, r: bufio.NewReader(conn)}, nil
}

func (w *wire) say(format string, args ...any) error {
	line := fmt.Sprintf(format, args...)
	w.remember("C: " + line)
	_, err := io.WriteString(w.Conn, line+"\r\n")
	return err
}

// line reads one line without its end.
func (w *wire) line(limit time.Duration) (string, error) {
	w.SetReadDeadline(time.Now().Add(limit))
	text, err := w.r.ReadString('\n')
	text = strings.TrimRight(text, "\r\n")
	w.bye = w.bye || strings.HasPrefix(text, "* BYE") || strings.HasPrefix(text, "BYE")
	if text != "" || err == nil {
		w.remember("S: " + text)
	}
	if err != nil {
		w.remember("S: " + err.Error())
	}
	return text, err
}

// until reads lines up to and including the first with one of the prefixes.
func (w *wire) until(limit time.Duration, prefixes ...string) (before []string, last string, err error) {
	deadline := time.Now().Add(limit)
	for {
		text, err := w.line(time.Until(deadline))
		if err != nil {
			return before, text, fmt.Errorf("waiting for %q: %w\n%s", prefixes, err, w.transcript())
		}
		for _, p := range prefixes {
			if strings.HasPrefix(text, p) {
				return before, text, nil
			}
		}
		before = append(before, text)
	}
}

// farewell reads to the end of the connection. It must be a BYE and then, on
// TLS, a close_notify: a bare end of the TCP stream is io.ErrUnexpectedEOF.
func (w *wire) farewell(limit time.Duration) error {
	_, _, err := w.until(limit, "\x00 no line begins so")
	switch {
	case !errors.Is(err, io.EOF):
		return fmt.Errorf("not a clean close: %w", err)
	case !w.bye:
		return fmt.Errorf("closed without BYE\n%s", w.transcript())
	}
	return nil
}

func (w *wire) remember(line string) {
	if len(line) > 200 {
		line = line[:200] + "…"
	}
	if w.log = append(w.log, line); len(w.log) > 60 {
		w.log = w.log[20:]
	}
}

func (w *wire) transcript() string { return strings.Join(w.log[max(0, len(w.log)-15):], "\n") }

// upgrade is the client's half of STARTTLS after the server's OK.
func (w *wire) upgrade(config *tls.Config) error {
	conn := tls.Client(w.Conn, config)
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if err := conn.Handshake(); err != nil {
		return err
	}
	conn.SetDeadline(time.Time{})
	w.Conn, w.r = conn, bufio.NewReader(conn)
	return nil
}

// errRefused is a NO or BAD to an IMAP command.
var errRefused = errors.New("refused")

// imap runs one IMAP command and returns the untagged lines, literals' content
// among them, and the tagged one.
func (w *wire) imap(limit time.Duration, format string, args ...any) ([]string, string, error) {
	w.tags++
	tag := fmt.Sprintf("x%d", w.tags)
	if err := w.say(tag+" "+format, args...); err != nil {
		return nil, "", err
	}
	return w.tagged(limit, tag)
}

func (w *wire) tagged(limit time.Duration, tag string) ([]string, string, error) {
	untagged, status, err := w.until(limit, tag+" ")
	if err == nil && !strings.HasPrefix(status, tag+" OK") {
		err = fmt.Errorf("%w: %s", errRefused, status)
	}
	return untagged, status, err
}

// append appends a small message and returns when the server has said OK.
func (w *wire) append(limit time.Duration, mailbox, subject string) error {
	message := "Subject: " + subject + "\r\nDate: Mon, 23 Nov 2026 12:00:00 +0000\r\nFrom: a@example.org\r\n\r\n" + subject + "\r\n"
	w.tags++
	tag := fmt.Sprintf("x%d", w.tags)
	if err := w.say("%s APPEND %s {%d}", tag, mailbox, len(message)); err != nil {
		return err
	}
	_, text, err := w.until(limit, "+", tag+" ")
	if err != nil {
		return err
	}
	if !strings.HasPrefix(text, "+") {
		return fmt.Errorf("%w: %s", errRefused, text)
	}
	if err := w.say("%s", message); err != nil {
		return err
	}
	_, _, err = w.tagged(limit, tag)
	return err
}

// imapLogin connects with STARTTLS and logs in by LOGIN.
func imapLogin(address, name, user, password string, limit time.Duration) (*wire, error) {
	w, err := dialWire(address, nil)
	if err != nil {
		return nil, err
	}
	if err = w.imapLogin(name, user, password, limit); err != nil {
		w.Close()
		return nil, err
	}
	return w, nil
}

func (w *wire) imapLogin(name, user, password string, limit time.Duration) error {
	if _, _, err := w.until(5*time.Second, "* OK"); err != nil {
		return err
	}
	if _, _, err := w.imap(5*time.Second, "STARTTLS"); err != nil {
		return err
	}
	if err := w.upgrade(lab.ca.client(name)); err != nil {
		return err
	}
	_, _, err := w.imap(limit, "LOGIN %s %s", user, password)
	return err
}

// count returns the number of messages in mailbox, by STATUS.
func (w *wire) count(mailbox string) (int, error) {
	untagged, _, err := w.imap(10*time.Second, "STATUS %s (MESSAGES)", mailbox)
	if err != nil {
		return 0, err
	}
	for _, line := range untagged {
		var n int
		if i := strings.Index(line, "(MESSAGES "); i > 0 {
			if _, err := fmt.Sscanf(line[i:], "(MESSAGES %d)", &n); err == nil {
				return n, nil
			}
		}
	}
	return 0, fmt.Errorf("no STATUS answer\n%s", w.transcript())
}

// subjects returns the subjects of all messages in mailbox, sorted by number.
func (w *wire) subjects(mailbox string) ([]string, error) {
	if _, _, err := w.imap(10*time.Second, "EXAMINE %s", mailbox); err != nil {
		return nil, err
	}
	untagged, _, err := w.imap(30*time.Second, "FETCH 1:* (BODY.PEEK[HEADER.FIELDS (SUBJECT)])")
	if err != nil && !errors.Is(err, errRefused) { // an empty mailbox refuses 1:*
		return nil, err
	}
	var all []string
	for _, line := range untagged {
		if subject, found := strings.CutPrefix(line, "Subject: "); found {
			all = append(all, subject)
		}
	}
	return all, nil
}

// plain is the initial response of SASL PLAIN.
func plain(authzid, user, password string) string {
	return base64.StdEncoding.EncodeToString([]byte(authzid + "\x00" + user + "\x00" + password))
}

// keep closes the connection at the end of the test.
func (w *wire) keep(t testing.TB) *wire {
	t.Cleanup(func() { w.Close() })
	return w
}
