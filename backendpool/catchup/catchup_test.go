package catchup

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/emersion/go-imap/v2"
	"github.com/emersion/go-imap/v2/imapclient"

	"github.com/posthouse/posthouse/backendpool"
)

// members returns two plaintext backends at address, and what compares them.
func members(address string, options Options) (c *Comparer, a, b *backendpool.Backend) {
	for _, m := range []**backendpool.Backend{&a, &b} {
		*m = &backendpool.Backend{Addresses: map[string]string{"imap": address}, TLS: backendpool.TLSOff,
			Style: backendpool.StyleAuthzid, User: "proxy"}
		(*m).SetPassword("secret")
	}
	a.Name, b.Name = "a", "b"
	pool := backendpool.New([]*backendpool.Backend{a, b}, backendpool.Limits{ConnectTimeout: time.Second, Logins: 4})
	return New(pool, options), a, b
}

// TestReplay: where there is no proxy user nothing can be said, least of all
// "equal".
func TestReplay(t *testing.T) {
	c, a, b := members("127.0.0.1:1", Options{})
	b.Style = backendpool.StyleReplay
	if _, err := c.Compare(t.Context(), a, b, nil); err == nil || !strings.Contains(err.Error(), "backend b has login style replay") {
		t.Error(err)
	}
}

// TestUnreachable: a backend that is away is an error, every user is to be
// compared again, and it is not tried for all of them.
func TestUnreachable(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	c, a, b := members(l.Addr().String(), Options{Parallel: 2})
	var users []string
	for i := range 500 {
		users = append(users, fmt.Sprintf("u%03d", i))
	}
	report, err := c.Compare(t.Context(), a, b, users)
	if err == nil || !strings.Contains(err.Error(), "given up after 20 users") {
		t.Error(err)
	}
	if n := len(report.Unequal); n < most || n > 30 || report.Equal != 0 {
		t.Errorf("%d to be compared again, %d equal", n, report.Equal)
	}
	if again := slices.Sorted(slices.Values(slices.Concat(report.Unequal, report.Unasked))); !slices.Equal(again, users) {
		t.Errorf("not all are to be compared again: %d", len(again))
	}
}

// TestContext: servers that accept and say nothing hold nobody up when the
// switch gives up, nor for longer than a user's timeout.
func TestContext(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, a, b := members(l.Addr().String(), Options{Timeout: time.Minute})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := c.Compare(ctx, a, b, []string{"u", "v"}); !errors.Is(err, context.DeadlineExceeded) || time.Since(began) > 10*time.Second {
		t.Error(err, time.Since(began))
	}
	c.options.Timeout = 50 * time.Millisecond
	report, err := c.Compare(t.Context(), a, b, []string{"u"})
	if !errors.Is(err, context.DeadlineExceeded) || !slices.Equal(report.Unequal, []string{"u"}) {
		t.Error(report, err)
	}
}

// TestRefused: that both members refuse a user counts only where the proxy
// user's password of today has been accepted on both.
func TestRefused(t *testing.T) {
	c, a, b := members("127.0.0.1:1", Options{})
	judge := func() (*Report, error) {
		ta := tally{}
		ta.add("ghost", outcome{refused: true})
		return ta.end(t.Context(), c, a, b)
	}
	c.prove(a, "secret")
	report, err := judge()
	if err == nil || strings.Contains(err.Error(), "backend a") || !strings.Contains(err.Error(), "backend b") {
		t.Errorf("b has accepted nobody: %v", err)
	}
	if len(report.Refused) > 0 || !slices.Equal(report.Unequal, []string{"ghost"}) {
		t.Errorf("ghost is to be compared again: %+v", report)
	}
	c.prove(b, "secret")
	if report, err := judge(); err != nil || report.Err() != nil || !slices.Equal(report.Refused, []string{"ghost"}) || report.Equal != 0 {
		t.Error(report, err)
	}
	a.SetPassword("changed")
	if _, err := judge(); err == nil {
		t.Error("the changed password has been accepted by nobody")
	}
}

// TestReport: all is counted, the first three are named, on one line and in not
// too many words.
func TestReport(t *testing.T) {
	ta := tally{}
	for i := range 30 {
		ta.add(fmt.Sprintf("u%02d", 29-i), outcome{differences: []Difference{{User: fmt.Sprintf("u%02d", 29-i), Mailbox: "INBOX", What: "ACL", From: strings.Repeat("é\n", i)}}})
	}
	c, a, b := members("127.0.0.1:1", Options{})
	report, err := ta.end(t.Context(), c, a, b)
	if err != nil {
		t.Fatal(err)
	}
	words := report.Err().Error()
	begins := "users that differ: 30, differences: 30: u10, mailbox \"INBOX\": ACL: é\ufffdé"
	if !strings.HasPrefix(words, begins) || !strings.HasSuffix(words, "; and 27 more") || len(words) > 100+spelled*(inWords+10) || strings.Contains(words, "\n") {
		t.Errorf("%q", words)
	}
	if len(report.Unequal) != 30 || report.Unequal[0] != "u00" || len(report.Differences) != most {
		t.Error(report.Unequal, len(report.Differences))
	}
}

// TestReportOfFew: several differences of one user do not hide another user.
func TestReportOfFew(t *testing.T) {
	ta := tally{}
	var many []Difference
	for i := range 50 {
		many = append(many, Difference{User: "u1", Mailbox: fmt.Sprint("m", i), What: "mailbox", To: "exists"})
	}
	ta.add("u2", outcome{differences: []Difference{{User: "u2", What: "login", From: "accepted", To: "refused"}}})
	ta.add("u1", outcome{differences: many, skipped: []string{"quota", "ACLs"}})
	ta.add("u3", outcome{skipped: []string{"ACLs"}})
	c, a, b := members("127.0.0.1:1", Options{})
	report, err := ta.end(t.Context(), c, a, b)
	if err != nil {
		t.Fatal(err)
	}
	const words = `users that differ: 2, differences: 51: u1, mailbox "m0": mailbox: nothing on the old member, exists on the new one; ` +
		`u2: login: accepted on the old member, refused on the new one; ` +
		`u1, mailbox "m1": mailbox: nothing on the old member, exists on the new one; and 48 more`
	if got := report.Err().Error(); got != words {
		t.Errorf("%s\nwant\n%s", got, words)
	}
	if got, want := report.String(), "users compared: 1 equal, 2 not; not compared: ACLs, quota"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// TestPace: the login rate is each backend's own, and who waits for a turn
// leaves when the comparison ends.
func TestPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, a, b := members("127.0.0.1:1", Options{PerSecond: 10})
		began := time.Now()
		for range 11 {
			for _, m := range []*backendpool.Backend{a, b} {
				if err := c.takeTurn(t.Context(), m); err != nil {
					t.Fatal(err)
				}
			}
		}
		if took := time.Since(began); took != time.Second {
			t.Errorf("11 logins at each, ten a second, took %v", took)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if err := c.takeTurn(ctx, a); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// TestDifference: of a mailbox that only one has, that alone is said.
func TestDifference(t *testing.T) {
	from := holdings{
		{"INBOX", whatMailbox}: "exists", {"INBOX", whatStatus}: "1",
		{"Old", whatMailbox}: "exists", {"Old", whatStatus}: "7", {"Old", whatACL}: "x",
		{"Gone", whatSubscription}: "subscribed",
	}
	to := holdings{{"INBOX", whatMailbox}: "exists", {"INBOX", whatStatus}: "2", {"", whatActive}: `"s"`}
	var got []string
	for _, d := range difference("u", from, to) {
		got = append(got, d.Mailbox+":"+d.What)
	}
	if want := []string{":active script", "Gone:subscription", "INBOX:status", "Old:mailbox"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

// TestFirstDifference: the order of flags, their case and \Recent make none; a
// UID, a flag and a missing message do.
func TestFirstDifference(t *testing.T) {
	message := func(uid imap.UID, flags ...imap.Flag) *imapclient.FetchMessageBuffer {
		return &imapclient.FetchMessageBuffer{UID: uid, Flags: flags}
	}
	one := []*imapclient.FetchMessageBuffer{message(1, `\Seen`, "Work"), message(4)}
	for _, test := range []struct {
		other    []*imapclient.FetchMessageBuffer
		from, to string
	}{
		{[]*imapclient.FetchMessageBuffer{message(1, "work", `\seen`, `\Recent`), message(4)}, "", ""},
		{[]*imapclient.FetchMessageBuffer{message(1, "work"), message(4)}, `UID 1 (\seen work)`, "UID 1 (work)"},
		{[]*imapclient.FetchMessageBuffer{message(1, `\Seen`, "work"), message(5)}, "UID 4 ()", "UID 5 ()"},
		{[]*imapclient.FetchMessageBuffer{message(1, `\Seen`, "work")}, "UID 4 ()", "no further message"},
	} {
		if from, to := firstDifference(one, test.other); from != test.from || to != test.to {
			t.Errorf("%q and %q, want %q and %q", from, to, test.from, test.to)
		}
	}
}

// TestPlaintextBehindSTARTTLS: what somebody in between has put there is not
// taken for the backend's words.
func TestPlaintextBehindSTARTTLS(t *testing.T) {
	c, a, _ := members("127.0.0.1:1", Options{})
	near, far := net.Pipe()
	defer far.Close()
	go func() {
		io.WriteString(far, "* OK hello\r\n")
		far.Read(make([]byte, 100))
		io.WriteString(far, "s OK begin\r\n* OK [CAPABILITY IMAP4rev1] mine\r\n")
	}()
	if _, err := secureIMAP(t.Context(), c.pool, a, "imap", near); err == nil || !strings.Contains(err.Error(), "plaintext behind") {
		t.Error(err)
	}
	if _, err := near.Write([]byte("x")); err == nil {
		t.Error("the connection is still open")
	}
}

// TestMeter: a backend that goes on and on is cut off.
func TestMeter(t *testing.T) {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	go func() {
		line := []byte(strings.Repeat("x", 1<<20))
		for {
			if _, err := far.Write(line); err != nil {
				return
			}
		}
	}()
	n, err := io.CopyN(io.Discard, newMeter(near), 2*maxAnswer)
	if err == nil || n < maxAnswer || n > maxAnswer+1<<20 {
		t.Errorf("%d octets, then %v", n, err)
	}
}
