package proxy

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/emersion/go-smtp"
)

// reply is an LMTP reply: its code, and its lines without code and CRLF, but
// with their enhanced status codes ("5.1.1 User unknown").
type reply struct {
	code  int
	lines []string
}

// newReply makes a reply of lines that have their enhanced status codes.
func newReply(code int, lines ...string) reply { return reply{code, lines} }

// replyTo makes a reply of an error. Every line gets the enhanced status code
// (RFC 2034 §4); X.0.0 if e has none of its own.
func replyTo(e *smtp.SMTPError) reply {
	enhanced := e.EnhancedCode
	if enhanced == smtp.EnhancedCodeNotSet {
		enhanced = smtp.EnhancedCode{e.Code / 100, 0, 0}
	}
	r := reply{code: e.Code}
	for line := range strings.SplitSeq(e.Message, "\n") {
		if enhanced != smtp.NoEnhancedCode {
			line = fmt.Sprintf("%d.%d.%d %s", enhanced[0], enhanced[1], enhanced[2], line)
		}
		r.lines = append(r.lines, line)
	}
	return r
}

// String is the reply for a log line.
func (r reply) String() string {
	return strconv.Itoa(r.code) + " " + strings.Join(r.lines, " / ")
}

// append adds the reply as it goes over the wire. Whatever its lines hold, it
// stays one reply.
func (r reply) append(p []byte) []byte {
	for i := range max(len(r.lines), 1) {
		p = strconv.AppendInt(p, int64(r.code), 10)
		switch {
		case i < len(r.lines)-1:
			p = append(p, '-')
		default:
			p = append(p, ' ')
		}
		if i < len(r.lines) {
			p = append(p, printable(r.lines[i])...)
		}
		p = append(p, "\r\n"...)
	}
	return p
}

// parseReplyLine parses one line of a backend's reply, without its CRLF. more
// says that another line follows. ok is false if it is none (RFC 5321 §4.2).
func parseReplyLine(line []byte) (code int, more bool, text string, ok bool) {
	if len(line) < 3 || line[0] < '2' || line[0] > '5' || len(line) > 3 && line[3] != ' ' && line[3] != '-' {
		return 0, false, "", false
	}
	for _, digit := range line[:3] {
		if digit < '0' || digit > '9' {
			return 0, false, "", false
		}
		code = 10*code + int(digit-'0')
	}
	if len(line) > 3 {
		more, text = line[3] == '-', printable(string(line[4:]))
	}
	return code, more, text, true
}
