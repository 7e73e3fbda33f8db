package proxy

import (
	"bytes"
	"io"
	"net"
	"reflect"
	"testing"
	"testing/iotest"
	"time"
)

// wire is a connection that hears what it was made with and keeps what is
// said.
type wire struct {
	io.Reader
	bytes.Buffer
}

func (w *wire) Read(p []byte) (int, error)       { return w.Reader.Read(p) }
func (w *wire) Write(p []byte) (int, error)      { return w.Buffer.Write(p) }
func (w *wire) Close() error                     { return nil }
func (w *wire) LocalAddr() net.Addr              { return nil }
func (w *wire) RemoteAddr() net.Addr             { return nil }
func (w *wire) SetDeadline(time.Time) error      { return nil }
func (w *wire) SetReadDeadline(time.Time) error  { return nil }
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

// readAllIMAP reads commands until an error and returns them with what was
// answered.
func readAllIMAP(t *testing.T, r io.Reader) (cmds []imapCommand, said string, reason Reason) {
	w := &wire{Reader: r}
	c := newLineConn(t.Context(), w, readAhead)
	for {
		cmd, err := readIMAPCommand(c)
		if err != nil {
			return cmds, w.String(), reasonOf(err)
		}
		size := 0
		for _, a := range cmd.args {
			size += len(a.text)
			for _, item := range a.items {
				size += len(item.text)
			}
		}
		if size > maxCommand {
			t.Fatalf("a command of %d octets was kept", size)
		}
		if cmd.fault == "" && !isIMAPTag([]byte(cmd.tag)) {
			t.Fatalf("tag %q was taken", cmd.tag)
		}
		cmds = append(cmds, cmd)
	}
}

// FuzzIMAPReader: whatever a stranger sends, the reader keeps its bounds, and
// how the octets are cut into packets changes nothing.
func FuzzIMAPReader(f *testing.F) {
	for _, seed := range []string{
		"a LOGIN alice \"wonder land\"\r\n", "a LOGIN {5}\r\nalice {3+}\r\npwd\r\n", "a LOGIN \"a{5}\" b\r\nb NOOP\r\n",
		"a ID (\"name\" NIL \"x\" {3+}\r\nabc)\r\n", "a AUTHENTICATE PLAIN =\r\n", "a FOO {99999999999999999999+}\r\n",
		"\r\n", "a\r\n", "a LOGIN \"\\\"\\\\\" x\r\n", "a X {8193}\r\nb NOOP\r\n", "a X (\r\n", "a X \x00\r\n", "a X {0}\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, p []byte) {
		cmds, said, reason := readAllIMAP(t, bytes.NewReader(p))
		again, saidAgain, reasonAgain := readAllIMAP(t, iotest.OneByteReader(bytes.NewReader(p)))
		if !reflect.DeepEqual(cmds, again) || said != saidAgain || reason != reasonAgain {
			t.Fatalf("in one piece: %+v, %q, %v\nin single octets: %+v, %q, %v", cmds, said, reason, again, saidAgain, reasonAgain)
		}
	})
}

// FuzzTrackerPieces: a tracker passes on what it is shown, unchanged, and how
// the stream is cut changes nothing of what it knows.
func FuzzTrackerPieces(f *testing.F) {
	f.Add([]byte("a SELECT x\r\nb IDLE\r\nDONE\r\n"), []byte("* 1 EXISTS\r\na OK\r\n+ idling\r\nb OK\r\n"), uint8(3))
	f.Add([]byte("a APPEND x {5}\r\nhello\r\nb LOGOUT\r\n"), []byte("+ go\r\na OK\r\n* BYE\r\nb OK\r\n"), uint8(1))
	f.Add([]byte("PUTSCRIPT \"a\" {5+}\r\nkeep;\r\nLOGOUT\r\n"), []byte("OK\r\nNO {3}\r\nabc\r\nBYE\r\n"), uint8(2))
	f.Add([]byte("RETR 1\r\nQUIT\r\n"), []byte("+OK\r\nhello\r\n.\r\n+OK bye\r\n"), uint8(4))
	f.Fuzz(func(t *testing.T, up, down []byte, step uint8) {
		if step == 0 {
			return
		}
		for _, d := range []dialect{&imapDialect{}, &pop3Dialect{}, &sieveDialect{}} {
			whole, pieces := d.tracker(&lineConn{}), d.tracker(&lineConn{})
			if whole.Up(bytes.Clone(up)) != nil {
				continue // it ends there
			}
			for rest := bytes.Clone(up); len(rest) > 0; {
				n := min(int(step), len(rest))
				if err := pieces.Up(rest[:n]); err != nil {
					t.Fatalf("%T: in pieces: %v", d, err)
				}
				rest = rest[n:]
			}
			var passed []byte
			if out := whole.Down(bytes.Clone(down)); !bytes.Equal(out, down) {
				t.Fatalf("%T: passed %q of %q", d, out, down)
			}
			for rest := bytes.Clone(down); len(rest) > 0; {
				n := min(int(step), len(rest))
				passed = append(passed, pieces.Down(rest[:n])...)
				rest = rest[n:]
			}
			if !bytes.Equal(passed, down) {
				t.Fatalf("%T: passed %q of %q in pieces", d, passed, down)
			}
			if whole.Leaving() != pieces.Leaving() || whole.Midway() != pieces.Midway() || whole.Proven() != pieces.Proven() ||
				whole.Ended(true, false, false) != pieces.Ended(true, false, false) {
				t.Fatalf("%T: %+v\nin pieces: %+v", d, whole, pieces)
			}
		}
	})
}
