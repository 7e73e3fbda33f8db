package integration

import (
	"bufio"
	"bytes"
	"compress/flate"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestSwitchInFlight: what a client may be at when its role is moved, with and
// without TLS between posthouse and the servers. Each switch opens, leaves nothing
// behind, and what was acknowledged is there; the old active does nothing
// afterwards. (400 COPYs: TestSafety01. A process that stands still: TestSafety04.)
func TestSwitchInFlight(t *testing.T) {
	t.Parallel()
	users := userNames(1)
	for name, plain := range map[string]bool{"TLS": false, "plaintext": true} {
		t.Run("cyrus, "+name, func(t *testing.T) {
			pair := newCyrusPair(t, users...)
			a, b := pair.a.backend(), pair.b.backend()
			a.plain, b.plain = plain, plain
			f := inFlight{startFrontend(t, newSite(t, a, b, users...)), map[string]string{"a": pair.a.mailDir(), "b": pair.b.mailDir()}}
			f.idle(t)
			f.compressed(t)
			f.half(t)
			f.large(t)
			mustNotOverlap(t, pair.a, pair.b)
		})
		t.Run("dovecot, "+name, func(t *testing.T) {
			s1, s2 := newDovecot(t), newDovecot(t)
			a, b := s1.backend(), s2.backend()
			a.plain, b.plain = plain, plain
			f := inFlight{startFrontend(t, newSite(t, a, b, users...)), map[string]string{"a": s1.mailDir(), "b": s2.mailDir()}}
			f.idle(t)
			w := f.p.as(t, users[0])
			if _, status, err := w.imap(5*time.Second, "COMPRESS DEFLATE"); err == nil {
				t.Errorf("it would hide the words that prove the end: %s", status)
			}
			w.Close()
			f.half(t)
			f.large(t)
		})
	}
}

// inFlight moves u0001's role to and fro. mail is where the backends keep theirs.
type inFlight struct {
	p    *posthouse
	mail map[string]string
}

// move switches the role while meanwhile goes on, which is to end by itself.
func (f inFlight) move(t *testing.T, meanwhile func()) (from string) {
	t.Helper()
	before := f.p.role(t)
	to := map[string]string{"a": "b", "b": "a"}[before.Active]
	ended := f.p.startSwitch(t, to)
	meanwhile()
	mustOpen(t, <-ended)
	r := f.p.mustBeOn(t, to)
	if len(r.Residues) > 0 {
		t.Errorf("residues: %+v", r.Residues)
	}
	has := contents(f.mail[before.Active])
	remains(t, time.Second, "the old active does nothing", func() bool { return contents(f.mail[before.Active]) == has })
	return before.Active
}

// contents are the names and sizes of the messages below dir.
func contents(dir string) string {
	var b strings.Builder
	filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || strings.Contains(entry.Name(), "dovecot") || strings.HasPrefix(entry.Name(), "cyrus.") {
			return nil
		}
		if info, err := entry.Info(); err == nil {
			fmt.Fprintln(&b, path, info.Size())
		}
		return nil
	})
	return b.String()
}

// A client in IDLE is told BYE.
func (f inFlight) idle(t *testing.T) {
	t.Helper()
	w := f.p.as(t, "u0001")
	_, _, err := w.imap(5*time.Second, "SELECT INBOX")
	must(t, err)
	must(t, w.say("i IDLE"))
	_, _, err = w.until(5*time.Second, "+")
	must(t, err)
	f.move(t, func() { must(t, w.farewell(10*time.Second)) })
}

// Under compression no word can be put in; the connections are closed.
func (f inFlight) compressed(t *testing.T) {
	t.Helper()
	w := f.p.as(t, "u0001")
	_, _, err := w.imap(5*time.Second, "COMPRESS DEFLATE")
	must(t, err)
	out, err := flate.NewWriter(w, flate.BestSpeed)
	must(t, err)
	in := bufio.NewReader(flate.NewReader(w.r))
	fmt.Fprint(out, "n NOOP\r\n")
	must(t, out.Flush())
	w.SetReadDeadline(time.Now().Add(10 * time.Second))
	line, err := in.ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "n OK") {
		t.Fatalf("NOOP, compressed: %q, %v", line, err)
	}
	f.move(t, func() {
		if rest, err := io.ReadAll(in); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("the session goes on: %q", rest)
		}
	})
}

// A client stands still within a literal: what never gets complete is never
// executed, and is no reason to wait for long.
func (f inFlight) half(t *testing.T) {
	t.Helper()
	w := f.p.as(t, "u0001")
	must(t, w.say("h APPEND INBOX {1000}"))
	_, _, err := w.until(5*time.Second, "+")
	must(t, err)
	must(t, w.say("Subject: half"))
	from := f.move(t, func() {
		if _, _, err := w.tagged(25*time.Second, "h"); err == nil {
			t.Error("half a message was taken")
		}
	})
	if has := contents(f.mail[from]); strings.Contains(has, " 1000\n") {
		t.Errorf("half a message is there: %s", has)
	}
}

// 50 MB on their way: if the client is told OK, they are there.
func (f inFlight) large(t *testing.T) {
	t.Helper()
	w := f.p.as(t, "u0001")
	head := "Subject: large\r\n\r\n"
	line := strings.Repeat("x", 74) + "\r\n"
	body := bytes.Repeat([]byte(line), 50<<20/len(line))
	size := len(head) + len(body)
	must(t, w.say("l APPEND INBOX {%d}", size))
	_, _, err := w.until(5*time.Second, "+")
	must(t, err)
	_, err = w.Write(append([]byte(head), body[:5<<20]...))
	must(t, err)
	acknowledged := false
	from := f.move(t, func() {
		go func() {
			_, _ = w.Write(body[5<<20:]) // it may be cut off
			_, _ = io.WriteString(w, "\r\n")
		}()
		_, _, err := w.tagged(30*time.Second, "l")
		acknowledged = err == nil
	})
	has := contents(f.mail[from])
	isThere := strings.Contains(has, fmt.Sprintf(" %d\n", size)) || strings.Contains(has, fmt.Sprintf(",W=%d", size)) // Dovecot keeps bare LFs
	t.Logf("50 MB: acknowledged %v, there %v", acknowledged, isThere)
	if acknowledged && !isThere {
		t.Errorf("a message that was acknowledged is not on %s", from)
	}
	w.Close()
}
