package catchup

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"

	"github.com/posthouse/posthouse/backendpool"
)

// ManageSieve (RFC 5804), as far as reading goes:
//
//	S: "IMPLEMENTATION" "be1" … OK
//	C: STARTTLS                        S: OK, then after the handshake capabilities and OK again
//	C: AUTHENTICATE "PLAIN" "…"        S: OK
//	C: LISTSCRIPTS                     S: "summer" · "winter" ACTIVE · OK
//	C: GETSCRIPT "summer"              S: {31} … · OK
//	C: LOGOUT                          S: OK
const (
	maxScript  = 4 << 20 // octets of a string; Dovecot's default for a script is 1 MiB
	maxLine    = 64 << 10
	maxRows    = 10_000
	maxScripts = 1000
)

// addScripts adds the user's scripts and which is active.
func (c *Comparer) addScripts(ctx context.Context, b *backendpool.Backend, service, user string, h holdings) error {
	err := c.readScripts(ctx, b, service, user, h)
	if err != nil {
		return fmt.Errorf("ManageSieve of backend %s: %w", b.Name, err)
	}
	return nil
}

func (c *Comparer) readScripts(ctx context.Context, b *backendpool.Backend, service, user string, h holdings) error {
	conn, stop, release, err := c.open(ctx, b, service)
	if err != nil {
		return err
	}
	defer func() {
		stop()
		_ = conn.Close() // all that was wanted has been read
	}()
	s := newSieve(conn)
	err = s.logIn(b, service, user, func() (net.Conn, error) { return c.pool.Secure(ctx, b, service, conn) })
	release()
	if err != nil {
		return err
	}
	rows, err := s.command("LISTSCRIPTS")
	if err != nil {
		return err
	}
	if len(rows) > maxScripts {
		return fmt.Errorf("more than %d scripts", maxScripts)
	}
	for _, row := range rows {
		active := len(row) == 2 && row[1].atom && strings.EqualFold(row[1].text, "ACTIVE")
		if row[0].atom || len(row) != 1 && !active {
			return fmt.Errorf("LISTSCRIPTS: unexpected %q", row)
		}
		name := row[0].text
		if active {
			h[item{"", whatActive}] = strconv.Quote(name)
		}
		quoted, err := quote(name)
		if err != nil {
			return err
		}
		content, err := s.command("GETSCRIPT " + quoted)
		if err != nil {
			return err
		}
		if len(content) != 1 || len(content[0]) != 1 || content[0][0].atom {
			return fmt.Errorf("GETSCRIPT %s: not one string", quoted)
		}
		h[item{"", whatScript + strconv.Quote(name)}] = fmt.Sprintf("SHA-256 %.8x…", sha256.Sum256([]byte(content[0][0].text)))
	}
	_, err = s.command("LOGOUT")
	return err
}

// sieve is a ManageSieve conversation.
type sieve struct {
	meter *meter
	r     *bufio.Reader
}

func newSieve(conn net.Conn) *sieve {
	m := newMeter(conn)
	return &sieve{m, bufio.NewReader(m)}
}

// logIn reads the greeting, begins TLS by secure where the backend wants
// STARTTLS, and authenticates.
func (s *sieve) logIn(b *backendpool.Backend, service, user string, secure func() (net.Conn, error)) error {
	if _, err := s.answer(); err != nil {
		return fmt.Errorf("greeting: %w", err)
	}
	if b.TLSOf(service) == backendpool.TLSStartTLS {
		if _, err := s.command("STARTTLS"); err != nil {
			return err
		}
		if s.r.Buffered() > 0 {
			return errors.New("plaintext behind the answer to STARTTLS")
		}
		conn, err := secure()
		if err != nil {
			return err
		}
		*s = *newSieve(conn)
		if _, err := s.answer(); err != nil { // RFC 5804 §2.2: capabilities again
			return fmt.Errorf("after STARTTLS: %w", err)
		}
	}
	authzid, authcid, password := credentials(b, user, b.Password())
	response := base64.StdEncoding.EncodeToString([]byte(authzid + "\x00" + authcid + "\x00" + password))
	if err := s.say(`AUTHENTICATE "PLAIN" "` + response + `"`); err != nil {
		return err
	}
	if _, err := s.answer(); err != nil {
		return fmt.Errorf("AUTHENTICATE: %w", err)
	}
	return nil
}

// token is a string, or a word that was not quoted.
type token struct {
	text string
	atom bool
}

// String is for messages.
func (t token) String() string { return t.text }

// command sends a command and returns the lines before its OK.
func (s *sieve) command(line string) ([][]token, error) {
	if err := s.say(line); err != nil {
		return nil, err
	}
	rows, err := s.answer()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", line, err)
	}
	return rows, nil
}

func (s *sieve) say(line string) error {
	_, err := io.WriteString(s.meter, line+"\r\n")
	return err
}

// answer reads lines up to OK; NO and BYE are errors with the server's words.
func (s *sieve) answer() ([][]token, error) {
	s.meter.refill()
	var rows [][]token
	for len(rows) < maxRows {
		row, err := s.line()
		if err != nil {
			return nil, err
		}
		if len(row) == 0 {
			continue
		}
		if row[0].atom {
			switch strings.ToUpper(row[0].text) {
			case "OK":
				return rows, nil
			case "NO", "BYE":
				return nil, fmt.Errorf("the server says %q", row)
			}
		}
		rows = append(rows, row)
	}
	return nil, fmt.Errorf("more than %d lines", maxRows)
}

// line reads one line, literals included.
func (s *sieve) line() ([]token, error) {
	var row []token
	for n := 0; n < maxLine; n++ {
		b, err := s.r.ReadByte()
		if err != nil {
			return nil, err
		}
		switch b {
		case '\r', ' ':
		case '\n':
			return row, nil
		case '"':
			text, err := s.quoted()
			if err != nil {
				return nil, err
			}
			row = append(row, token{text, false})
			n += len(text)
		case '{':
			text, err := s.literal()
			if err != nil {
				return nil, err
			}
			row = append(row, token{text, false})
		default: // a word, or a response code, which is kept for the message
			text, err := s.word(b)
			if err != nil {
				return nil, err
			}
			row = append(row, token{text, true})
			n += len(text)
		}
	}
	return nil, fmt.Errorf("a line of more than %d octets", maxLine)
}

func (s *sieve) quoted() (string, error) {
	var text strings.Builder
	for text.Len() < maxLine {
		b, err := s.r.ReadByte()
		if err == nil && b == '\\' {
			b, err = s.r.ReadByte()
		} else if err == nil && b == '"' {
			return text.String(), nil
		}
		if err != nil {
			return "", err
		}
		// RFC 5804 §4 has no line ends here. Cyrus 3.6 does not escape the
		// quotes in a script's name: better an error than to wait for more.
		if b == '\r' || b == '\n' {
			return "", fmt.Errorf("a quoted string that does not end: %.80q", text.String())
		}
		text.WriteByte(b)
	}
	return "", fmt.Errorf("a quoted string of more than %d octets", maxLine)
}

// literal reads what follows an opening brace.
func (s *sieve) literal() (string, error) {
	head, err := s.r.ReadSlice('\n')
	if err != nil {
		return "", err
	}
	digits, ok := strings.CutSuffix(strings.TrimRight(string(head), "\r\n"), "}")
	size, err := strconv.ParseUint(strings.TrimSuffix(digits, "+"), 10, 31)
	if !ok || err != nil {
		return "", fmt.Errorf("a literal that begins with {%q", head)
	}
	if size > maxScript {
		return "", fmt.Errorf("a string of %d octets", size)
	}
	text := make([]byte, size)
	_, err = io.ReadFull(s.r, text)
	return string(text), err
}

func (s *sieve) word(first byte) (string, error) {
	text := []byte{first}
	for len(text) < maxLine {
		next, err := s.r.Peek(1)
		if err != nil {
			return "", err
		}
		if strings.IndexByte(" \r\n\"", next[0]) >= 0 {
			return string(text), nil
		}
		b, _ := s.r.ReadByte() // it has been seen
		text = append(text, b)
	}
	return "", fmt.Errorf("a word of more than %d octets", maxLine)
}

// quote makes a quoted string (RFC 5804 §4).
func quote(s string) (string, error) {
	if strings.ContainsAny(s, "\x00\r\n") {
		return "", fmt.Errorf("script name %q", s)
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(s) + `"`, nil
}
