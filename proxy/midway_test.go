package proxy

import (
	"testing"

	"github.com/posthouse/posthouse/proxy/splice"
)

// A client that is inside a command when its role is moved finishes it; in
// POP3 nothing is written before QUIT, so that it can be cut anywhere.
func TestMidway(t *testing.T) {
	up, down := true, false
	for _, c := range []struct {
		name  string
		t     splice.Tracker
		steps []any // up or down, then a text and whether it leaves the client inside a command
	}{
		{"APPEND", &imapTracker{}, []any{
			up, "a NOOP\r\n", false, up, "b APPEND INBOX {5}\r\n", true, down, "+ go\r\n", true,
			up, "hel", true, up, "lo", true, up, "\r\n", false,
		}},
		{"APPEND refused", &imapTracker{}, []any{up, "b APPEND INBOX {5}\r\n", true, down, "b NO full\r\n", false}},
		{"half a line", &imapTracker{}, []any{up, "a NO", true, up, "OP\r\n", false}},
		{"IDLE", &imapTracker{}, []any{up, "a IDLE\r\n", false, down, "+ idling\r\n", false, up, "DONE\r\n", false}},
		{"COMPRESS", &imapTracker{}, []any{up, "a COMPRESS DEFLATE\r\n", false, down, "a OK\r\n", false, up, "\x00half", false}},
		{"PUTSCRIPT", &sieveTracker{}, []any{up, "PUTSCRIPT \"x\" {4+}\r\n", true, up, "keep", true, up, "\r\n", false}},
		{"POP3", &pop3Tracker{}, []any{up, "RE", false, up, "TR 1\r\n", false}},
	} {
		for i := 0; i < len(c.steps); i += 3 {
			text, want := c.steps[i+1].(string), c.steps[i+2].(bool)
			if c.steps[i] == up {
				if err := c.t.Up([]byte(text)); err != nil {
					t.Errorf("%s: %q: %v", c.name, text, err)
				}
			} else {
				c.t.Down([]byte(text))
			}
			if got := c.t.Midway(); got != want {
				t.Errorf("%s: inside a command after %q: %v", c.name, text, got)
			}
		}
	}
}
