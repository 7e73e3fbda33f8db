package integration

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

// mailServer is a real server, looked at directly and not through posthouse.
type mailServer interface {
	as(t testing.TB, user string) *wire
	lmtp() string
}

// inbox returns the messages in user's INBOX, octet by octet, in their order.
func inbox(t testing.TB, server mailServer, user string) []string {
	t.Helper()
	w := server.as(t, user)
	defer w.Close()
	messages, err := w.messages("INBOX")
	must(t, err)
	return messages
}

// subjectsOf returns the subjects in user's INBOX, in their order.
func subjectsOf(t testing.TB, server mailServer, user string) []string {
	t.Helper()
	w := server.as(t, user)
	defer w.Close()
	subjects, err := w.subjects("INBOX")
	must(t, err)
	return subjects
}

// literalAtEnd is what announces a literal (RFC 9051 §4.3).
var literalAtEnd = regexp.MustCompile(`\{(\d+)\}$`)

// messages returns each message of mailbox, octet by octet.
func (w *wire) messages(mailbox string) ([]string, error) {
	if _, _, err := w.imap(10*time.Second, "EXAMINE %s", mailbox); err != nil {
		return nil, err
	}
	w.tags++
	tag := fmt.Sprintf("x%d", w.tags)
	if err := w.say("%s FETCH 1:* (BODY.PEEK[])", tag); err != nil {
		return nil, err
	}
	var all []string
	for {
		line, err := w.line(30 * time.Second)
		if err != nil {
			return all, fmt.Errorf("%w\n%s", err, w.transcript())
		}
		if m := literalAtEnd.FindStringSubmatch(line); m != nil {
			size, _ := strconv.Atoi(m[1])
			octets := make([]byte, size)
			if _, err := io.ReadFull(w.r, octets); err != nil {
				return all, err
			}
			all = append(all, string(octets))
		}
		switch {
		case strings.HasPrefix(line, tag+" OK"):
			return all, nil
		case strings.HasPrefix(line, tag+" ") && len(all) == 0: // an empty mailbox refuses 1:*
			return nil, nil
		case strings.HasPrefix(line, tag+" "):
			return all, fmt.Errorf("%w: %s", errRefused, line)
		}
	}
}

// traceFields are the header fields that the way of a message adds at its top.
var traceFields = []string{"return-path", "received", "delivered-to", "x-sieve", "x-cyrus-session-id"}

// withoutTrace returns what was sent, of a message as a server keeps it: own is
// its own first line, and what is before it must be trace fields only.
func withoutTrace(message, own string) (string, error) {
	at := strings.Index(message, own+"\r\n")
	if at < 0 {
		return "", errors.New("the message's own first field is gone")
	}
	for line := range strings.SplitSeq(strings.TrimSuffix(message[:at], "\r\n"), "\r\n") {
		name, _, _ := strings.Cut(line, ":")
		if line == "" || line[0] == ' ' || line[0] == '\t' {
			continue // at == 0, or folded
		}
		if !slices.Contains(traceFields, strings.ToLower(name)) {
			return "", fmt.Errorf("a field that nobody sent: %q", line)
		}
	}
	return message[at:], nil
}

// mustHold asserts that user's INBOX holds exactly the messages that were sent,
// once each unless one may be there twice, octet by octet, in any order.
func mustHold(t testing.TB, server mailServer, user string, sent ...*parcel) {
	t.Helper()
	has := inbox(t, server, user)
	found := 0
	for _, p := range sent {
		times := 0
		for _, message := range has {
			if !strings.Contains(message, p.ownLine()+"\r\n") {
				continue
			}
			times++
			if got, err := withoutTrace(message, p.ownLine()); err != nil || got != p.message() {
				t.Errorf("%s: %s arrived changed (%v), at octet %d of %d: %.200q", user, p.id, err, differs(got, p.message()),
					len(p.message()), got[min(len(got), max(0, differs(got, p.message())-20)):])
			}
		}
		if times != 1 && !(times == 2 && slices.Contains(p.mayBeTwice, user)) {
			t.Errorf("%s has %s %d times", user, p.id, times)
		}
		found += times
	}
	if len(has) != found {
		t.Errorf("%s has %d messages, and %d of those that were sent", user, len(has), found)
	}
}

// differs is where a and b begin to differ.
func differs(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}
