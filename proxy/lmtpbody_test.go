package proxy

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/emersion/go-smtp"
)

const (
	testLine = 40 // short, so that folding is seen
	testHops = 3
)

// filtered is what became of a message.
type filtered struct {
	out    string // as it goes to a backend, without terminator
	rest   string // DATA: what followed the end
	fault  *smtp.SMTPError
	octets int64
	done   bool
}

// filterData runs a filter over DATA that comes in pieces of size octets; 0 is
// all at once.
func filterData(f *bodyFilter, in string, size int) filtered {
	var r filtered
	var out []byte
	for len(in) > 0 && !r.done {
		piece := in
		if size > 0 {
			piece = in[:min(size, len(in))]
		}
		var n int
		out, n, r.done = f.data(out, []byte(piece))
		if !r.done && n != len(piece) {
			panic(fmt.Sprintf("%d of %d octets consumed", n, len(piece)))
		}
		in = in[n:]
	}
	r.out, r.rest, r.fault, r.octets = string(out), in, f.fault(), f.octets()
	return r
}

// filterChunks does the same for BDAT.
func filterChunks(f *bodyFilter, in string, size int) filtered {
	var out []byte
	for len(in) > 0 {
		piece := in
		if size > 0 {
			piece = in[:min(size, len(in))]
		}
		out = f.chunk(out, []byte(piece))
		in = in[len(piece):]
	}
	return filtered{out: string(f.finish(out)), fault: f.fault(), octets: f.octets()}
}

// unstuffed checks that out is what every server reads alike, and returns the
// message in it.
func unstuffed(t *testing.T, out string, maxLine int) string {
	t.Helper()
	if out == "" {
		return ""
	}
	if !strings.HasSuffix(out, "\r\n") {
		t.Fatalf("the last line has no end: %q", out)
	}
	lines := strings.Split(strings.TrimSuffix(out, "\r\n"), "\r\n")
	for i, line := range lines {
		if strings.ContainsAny(line, "\r\n") {
			t.Fatalf("a lone CR or LF in line %d: %q", i, line)
		}
		if line == "." {
			t.Fatalf("line %d ends the message: %q", i, out)
		}
		if after, stuffed := strings.CutPrefix(line, "."); stuffed {
			if !strings.HasPrefix(after, ".") {
				t.Fatalf("line %d has an unstuffed dot: %q", i, line)
			}
			line = after
		}
		if len(line) > maxLine {
			t.Fatalf("line %d has %d octets: %q", i, len(line), line)
		}
		lines[i] = line
	}
	return strings.Join(lines, "\r\n") + "\r\n"
}

var splits = []int{0, 1, 2, 3, 17, 517}

// The sender's message, as it must be understood by every backend, and the
// fault that it is without normalize.
var bodies = []struct {
	name string
	in   string // DATA, less the final ".\r\n"
	want string // the message that leaves with normalize
	bad  *smtp.SMTPError
}{
	{"empty", "", "", nil},
	{"plain", "A: b\r\n\r\nhello\r\n", "A: b\r\n\r\nhello\r\n", nil},
	{"body after a body line", "\r\na\r\n\r\nb\r\n", "\r\na\r\n\r\nb\r\n", nil},
	{"dots", "\r\n..\r\n...\r\n.x\r\n..x\r\n", "\r\n.\r\n..\r\nx\r\n.x\r\n", nil},
	{"longest line", "\r\n" + strings.Repeat("x", testLine) + "\r\n", "\r\n" + strings.Repeat("x", testLine) + "\r\n", nil},

	// What Cyrus, Dovecot or both take for the end of the message.
	{"LF.LF", "\r\na\n.\nMAIL FROM:<b@c>\r\n", "\r\na\r\n.\r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"LF.CRLF", "\r\na\n.\r\nMAIL FROM:<b@c>\r\n", "\r\na\r\n.\r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"CRLF.LF", "\r\na\r\n.\nMAIL FROM:<b@c>\r\n", "\r\na\r\n\r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"CRLF..LF", "\r\na\r\n..\nMAIL FROM:<b@c>\r\n", "\r\na\r\n.\r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"CRCRLF.CRLF is one end more", "\r\na\r\r\n..\r\nMAIL FROM:<b@c>\r\n", "\r\na \r\n.\r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"CR.CR", "\r\na\r.\rMAIL FROM:<b@c>\r\n", "\r\na . MAIL FROM:<b@c>\r\n", errBareNewline},
	{"CR.CRLF", "\r\na\r.\r\nMAIL FROM:<b@c>\r\n", "\r\na .\r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"CRLF.CR", "\r\na\r\n.\rMAIL FROM:<b@c>\r\n", "\r\na\r\n MAIL FROM:<b@c>\r\n", errBareNewline},
	{"CRLF.CRCRLF", "\r\na\r\n.\r\r\nMAIL FROM:<b@c>\r\n", "\r\na\r\n \r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"LF.CRCRLF", "\r\na\n.\r\r\nMAIL FROM:<b@c>\r\n", "\r\na\r\n. \r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"CRLFCR.CRLF", "\r\na\r\n\r.\r\nMAIL FROM:<b@c>\r\n", "\r\na\r\n .\r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"LF LF.LF", "\r\na\n\n.\n.\nb\r\n", "\r\na\r\n\r\n.\r\n.\r\nb\r\n", errBareNewline},
	{".LF first", ".\nMAIL FROM:<b@c>\r\n", "\r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"LF first", "\n.\r\nMAIL FROM:<b@c>\r\n", "\r\n.\r\nMAIL FROM:<b@c>\r\n", errBareNewline},
	{"CRs only", "\r\n\r\r\r\r\n", "\r\n   \r\n", errBareNewline},
	{"CRLFCR", "\r\n\rb\r\n", "\r\n b\r\n", errBareNewline},
	{"LFCR", "\r\na\n\r.\n\rb\r\n", "\r\na\r\n .\r\n b\r\n", errBareNewline},

	{"folded", "\r\n" + strings.Repeat("x", testLine) + ".\r\n", "\r\n" + strings.Repeat("x", testLine) + "\r\n .\r\n", errLongLine},
	{"folded twice", "\r\n" + strings.Repeat("x", 2*testLine) + "\r\n",
		"\r\n" + strings.Repeat("x", testLine) + "\r\n " + strings.Repeat("x", testLine-1) + "\r\n x\r\n", errLongLine},
	{"folded with a stuffed dot", "\r\n.." + strings.Repeat("x", testLine) + "\r\n",
		"\r\n." + strings.Repeat("x", testLine-1) + "\r\n x\r\n", errLongLine},
	{"folded before a letter of 2 octets", "\r\n" + strings.Repeat("x", testLine-1) + "é\r\n",
		"\r\n" + strings.Repeat("x", testLine-1) + "\r\n é\r\n", errLongLine},
	{"folded before a letter of 4 octets", "\r\n" + strings.Repeat("x", testLine-3) + "😀\r\n",
		"\r\n" + strings.Repeat("x", testLine-3) + "\r\n 😀\r\n", errLongLine},
	{"a letter that just fits", "\r\n" + strings.Repeat("x", testLine-4) + "😀\r\n",
		"\r\n" + strings.Repeat("x", testLine-4) + "😀\r\n", nil},
	{"folded behind a letter", "\r\n" + strings.Repeat("x", testLine-4) + "😀é\r\n",
		"\r\n" + strings.Repeat("x", testLine-4) + "😀\r\n é\r\n", errLongLine},
	{"a line of Latin-1 that just fits", "\r\n" + strings.Repeat("x", testLine-1) + "\xe9\r\n",
		"\r\n" + strings.Repeat("x", testLine-1) + "\xe9\r\n", nil},
	{"folded where UTF-8 is broken", "\r\n" + strings.Repeat("\x80", testLine+1) + "\r\n",
		"\r\n" + strings.Repeat("\x80", testLine) + "\r\n \x80\r\n", errLongLine},
	{"folded before broken UTF-8", "\r\n" + strings.Repeat("x", testLine) + "\x80\r\n",
		"\r\n" + strings.Repeat("x", testLine) + "\r\n \x80\r\n", errLongLine},
	{"a bare CR beyond the limit", "\r\n" + strings.Repeat("x", testLine) + "\ry\r\n",
		"\r\n" + strings.Repeat("x", testLine) + "\r\n  y\r\n", errBareNewline},
}

// No octets of a message can end it early at a backend, whatever the server
// takes for an end; and how they are cut on their way changes nothing.
func TestLMTPDataHasOneEnd(t *testing.T) {
	const next = "MAIL FROM:<next@example.org>\r\n"
	for _, body := range bodies {
		t.Run(body.name, func(t *testing.T) {
			in := body.in
			for _, size := range splits {
				r := filterData(newBodyFilter(true, testLine, testHops, 0), in+".\r\n"+next, size)
				if got := unstuffed(t, r.out, testLine); got != body.want || r.fault != nil {
					t.Errorf("in pieces of %d: %q (%v), want %q", size, got, r.fault, body.want)
				}
				if !r.done || size == 0 && r.rest != next {
					t.Errorf("in pieces of %d: ended %v, %q follows", size, r.done, r.rest)
				}
				if want := sizeOf(in); r.octets != want {
					t.Errorf("in pieces of %d: %d octets, want %d", size, r.octets, want)
				}

				r = filterData(newBodyFilter(false, testLine, testHops, 0), in+".\r\n"+next, size)
				if r.fault != body.bad || !r.done || size == 0 && r.rest != next {
					t.Errorf("strict, in pieces of %d: %v, want %v; ended %v, %q follows", size, r.fault, body.bad, r.done, r.rest)
				}
				if r.fault == nil && unstuffed(t, r.out, testLine) != body.want {
					t.Errorf("strict, in pieces of %d: %q, want %q", size, r.out, body.want)
				}
			}
		})
	}
}

// sizeOf is the size of a message that is given as DATA, less the stuffed dots.
func sizeOf(data string) int64 {
	dots := strings.Count("\r\n"+data, "\r\n.")
	return int64(len(data) - dots)
}

// In BDAT no dot is stuffed, and nothing but the count of octets ends it: the
// same messages, and those that DATA cannot carry.
func TestLMTPChunksHaveNoEnd(t *testing.T) {
	tests := []struct {
		name, in, want string
		bad            *smtp.SMTPError
	}{
		{"CRLF.CRLF", "\r\na\r\n.\r\nMAIL FROM:<b@c>\r\n", "\r\na\r\n.\r\nMAIL FROM:<b@c>\r\n", nil},
		{".CRLF first", ".\r\nb\r\n", ".\r\nb\r\n", nil},
		{"no last line end", "\r\na", "\r\na\r\n", nil},
		{"only a dot", ".", ".\r\n", nil},
		{"ends in CR", "\r\na\r", "\r\na \r\n", errBareNewline},
		{"ends in LF", "\r\na\n", "\r\na\r\n", errBareNewline},
		{"ends in a full line", "\r\n" + strings.Repeat("x", testLine), "\r\n" + strings.Repeat("x", testLine) + "\r\n", nil},
		{"CRCRLF.CRLF", "\r\na\r\r\n.\r\nb", "\r\na \r\n.\r\nb\r\n", errBareNewline},
		{"CRLF.LF", "\r\na\r\n.\nb", "\r\na\r\n.\r\nb\r\n", errBareNewline},
		{"CRLF.CR", "\r\na\r\n.\rb", "\r\na\r\n. b\r\n", errBareNewline},
	}
	for _, body := range bodies {
		if !strings.Contains("\r\n"+body.in, "\r\n.") {
			tests = append(tests, struct {
				name, in, want string
				bad            *smtp.SMTPError
			}{body.name, body.in, body.want, body.bad})
		}
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, size := range splits {
				r := filterChunks(newBodyFilter(true, testLine, testHops, 0), test.in, size)
				if got := unstuffed(t, r.out, testLine); got != test.want || r.fault != nil || r.octets != int64(len(test.in)) {
					t.Errorf("in pieces of %d: %q (%d octets, %v), want %q", size, got, r.octets, r.fault, test.want)
				}
				r = filterChunks(newBodyFilter(false, testLine, testHops, 0), test.in, size)
				if r.fault != test.bad {
					t.Errorf("strict, in pieces of %d: %v, want %v", size, r.fault, test.bad)
				}
				if r.fault == nil && unstuffed(t, r.out, testLine) != test.want {
					t.Errorf("strict, in pieces of %d: %q, want %q", size, r.out, test.want)
				}
			}
		})
	}
}

// Cyrus takes .CRLF behind 8189 octets for the end of the message. No limit
// that an operator sets lets a line grow that long.
func TestLMTPLineLimitIsBelowCyrus(t *testing.T) {
	in := "\r\n" + strings.Repeat(".", 8189) + ".\r\nMAIL FROM:<b@c>\r\n"
	r := filterChunks(newBodyFilter(true, 1<<20, 0, 0), in, 0)
	unstuffed(t, r.out, mostBodyLine)
	for line := range strings.SplitAfterSeq(r.out, "\r\n") {
		if len(line) >= 8189 {
			t.Errorf("a line of %d octets on the wire", len(line))
		}
	}
	if r := filterChunks(newBodyFilter(false, 1<<20, 0, 0), in, 0); r.fault != errLongLine {
		t.Errorf("strict: %v", r.fault)
	}
}

// A message that exceeds its limits is refused, and what follows it is found.
func TestLMTPBodyLimits(t *testing.T) {
	hop := "Received: from a by b\r\n"
	tests := []struct {
		name, in string
		want     *smtp.SMTPError
	}{
		{"as many hops as allowed", hop + "rECEIVED \t: x\r\n" + hop + "A: b\r\n\r\n" + hop + hop, nil},
		{"one hop more", hop + hop + "RECEIVED:\r\n\ta\r\nReceived  :x\r\n\r\n", errTooManyHops},
		{"other fields", hop + hop + hop + "Received-SPF: pass\r\nX-Received: a\r\nReceive: a\r\n Received: a\r\nReceived a: b\r\n\r\n", nil},
		{"folded before the colon", hop + hop + hop + "Received" + strings.Repeat(" ", testLine) + ":\r\n\r\n", nil},
		{"hops after bare LF", strings.ReplaceAll(hop+hop+hop+hop, "\r", "") + "\r\n", errTooManyHops},
		{"as big as allowed", "\r\n" + strings.Repeat("1234567\r\n", 22), nil}, // 200
		{"one octet more", "\r\n1" + strings.Repeat("1234567\r\n", 22), errTooBig},
		{"in one line", "\r\n" + strings.Repeat("x", 197) + "\r\n", errTooBig},
		{"too big outdoes the rest", hop + hop + hop + hop + strings.Repeat("1234567\r\n", 22), errTooBig},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, size := range splits {
				r := filterData(newBodyFilter(true, testLine, testHops, 200), test.in+".\r\nNOOP\r\n", size)
				if r.fault != test.want || !r.done || size == 0 && r.rest != "NOOP\r\n" {
					t.Errorf("in pieces of %d: %v, want %v; ended %v, %q follows", size, r.fault, test.want, r.done, r.rest)
				}
				if r.octets != int64(len(test.in)) {
					t.Errorf("in pieces of %d: %d octets, want %d", size, r.octets, len(test.in))
				}
				if r := filterChunks(newBodyFilter(true, testLine, testHops, 200), test.in, size); r.fault != test.want {
					t.Errorf("BDAT in pieces of %d: %v, want %v", size, r.fault, test.want)
				}
			}
		})
	}
}

// Stuffed dots do not count, so that what SIZE promised is what is measured.
func TestLMTPStuffedDotsAreNoOctets(t *testing.T) {
	in := "\r\n" + strings.Repeat("..\r\n", 10)
	r := filterData(newBodyFilter(false, testLine, 0, 32), in+".\r\n", 0)
	if r.fault != nil || r.octets != 32 {
		t.Errorf("%d octets, %v", r.octets, r.fault)
	}
}

// splitData finds the end of DATA octet by octet, and takes the dots off: the
// filter's job, done slowly.
func splitData(in string) (message, rest string, done bool) {
	for in != "" {
		if after, ended := strings.CutPrefix(in, ".\r\n"); ended {
			return message, after, true
		}
		in = strings.TrimPrefix(in, ".")
		line, after, _ := strings.Cut(in, "\r\n")
		if len(line) < len(in) {
			line += "\r\n"
		}
		message, in = message+line, after
	}
	return message, "", false
}

// slowly is what normalize makes of a message, but for the folding.
func slowly(message string) string {
	message = strings.ReplaceAll(message, "\r\n", "\n")
	message = strings.ReplaceAll(message, "\r", " ")
	if message != "" && !strings.HasSuffix(message, "\n") {
		message += "\n"
	}
	return strings.ReplaceAll(message, "\n", "\r\n")
}

func FuzzLMTPBody(f *testing.F) {
	for i, body := range bodies {
		f.Add([]byte(body.in+".\r\nNOOP\r\n"), uint8(i), i%2 == 0, i%3 == 0)
	}
	f.Add([]byte("Received: a\r\nreceived:b\r\nRECEIVED :c\r\nReceived: d\r\n\r\n.\r\n"), uint8(5), true, true)
	f.Fuzz(func(t *testing.T, in []byte, size uint8, normalize, limited bool) {
		hops, most := 0, int64(0)
		if limited {
			hops, most = testHops, 100
		}
		filter := func() *bodyFilter { return newBodyFilter(normalize, testLine, hops, most) }

		message, rest, done := splitData(string(in))
		whole := filterData(filter(), string(in), 0)
		if whole.done != done || done && (whole.rest != rest || whole.octets != int64(len(message))) {
			t.Fatalf("ended %v with %d octets, %q follows; want %v, %d, %q",
				whole.done, whole.octets, whole.rest, done, len(message), rest)
		}
		pieces := filterData(filter(), string(in), int(size))
		if done && pieces.fault != whole.fault || pieces.done != done {
			t.Fatalf("in pieces: %v, ended %v; whole: %v, %v", pieces.fault, pieces.done, whole.fault, done)
		}
		if done && whole.fault == nil {
			if pieces.out != whole.out {
				t.Fatalf("in pieces %q, whole %q", pieces.out, whole.out)
			}
			checkFiltered(t, whole, message, normalize)
		}

		whole = filterChunks(filter(), string(in), 0)
		pieces = filterChunks(filter(), string(in), int(size))
		if whole.fault != pieces.fault || whole.octets != int64(len(in)) {
			t.Fatalf("BDAT: in pieces %v, whole %v; %d octets of %d", pieces.fault, whole.fault, whole.octets, len(in))
		}
		if whole.fault == nil {
			if pieces.out != whole.out {
				t.Fatalf("BDAT: in pieces %q, whole %q", pieces.out, whole.out)
			}
			checkFiltered(t, whole, string(in), normalize)
		}
	})
}

// checkFiltered compares what leaves with the message as the sender knows it.
func checkFiltered(t *testing.T, r filtered, message string, normalize bool) {
	t.Helper()
	got := unstuffed(t, r.out, testLine)
	if !normalize {
		if message != "" && !strings.HasSuffix(message, "\r\n") {
			message += "\r\n"
		}
		if got != message {
			t.Fatalf("changed without normalize: %q, want %q", got, message)
		}
		return
	}
	unfolded := func(s string) string { return strings.ReplaceAll(s, "\r\n ", "") }
	if want := slowly(message); unfolded(got) != unfolded(want) {
		t.Fatalf("got %q, want %q", got, want)
	}
}

func BenchmarkLMTPBody(b *testing.B) {
	base64 := strings.Repeat("TWFpbCBjb2FjaGVzIGNoYW5nZWQgaG9yc2VzIGF0IHRoZSBwb3N0aG91c2UuIE1haWwgY29h\r\n", 14000)
	text := strings.Repeat("A line.\r\n\r\n.. and one that began with a dot, of the usual length for mail.\r\n", 14000)
	bare := strings.Repeat("A line that ends as Unix has it, which normalize makes a better one.\n", 14000)
	for name, in := range map[string]string{"base64": base64, "text": text, "bare": bare, "cr": strings.Repeat("\r", 1<<20)} {
		b.Run(name, func(b *testing.B) {
			src := []byte("A: b\r\n\r\n" + in)
			b.SetBytes(int64(len(src)))
			dst := make([]byte, 0, 128<<10)
			for b.Loop() {
				f := newBodyFilter(true, 998, 100, 0)
				for piece := range slices.Chunk(src, 32<<10) {
					dst, _, _ = f.data(dst[:0], piece)
				}
				if f.fault() != nil {
					b.Fatal(f.fault())
				}
			}
		})
	}
}
