// Package catchup is the built-in comparison of a switch: does the new member
// hold, for these users, what the old one holds?
//
// It logs in to both as the proxy user in the name of each user and reads:
// mailboxes with their special use, STATUS, messages and flags, subscriptions,
// ACLs, quota roots and limits, and over ManageSieve the scripts and which of
// them is active. It sends only commands that change nothing: LIST, STATUS,
// EXAMINE, FETCH of flags, GETACL, GETQUOTAROOT; LISTSCRIPTS, GETSCRIPT. The
// login itself can: Dovecot makes the directories, and at STATUS the INBOX, of a
// user that has none.
//
// What it does not see: the messages' bodies, internal dates and annotations,
// other users' \Seen in shared mailboxes, quota usage, mailboxes that are not
// the user's own (only subscriptions to them), and users whose login both
// members refuse (Report.Refused). Equality is no proof that nothing is at work
// on the old member.
package catchup

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"

	"github.com/posthouse/posthouse/backendpool"
)

// Services of a backend that serves there, for reading, while it is a replica
// that must not take users. Where nobody listens at IMAPService, "imap" and
// "sieve" are asked instead.
const (
	IMAPService  = "imap-replica"
	SieveService = "sieve-replica"
)

const (
	// most is how many differences and failures a Report names.
	most = 20
	// spelled is how many of them its Err spells out, how many a Report names of
	// one user, and inWords how many octets of each are in Err: it becomes part of
	// a switch's record, which every frontend keeps.
	spelled = 3
	inWords = 300
)

// Options bound a Comparer. The zero value means the defaults.
type Options struct {
	Parallel  int           // users at a time; default 8
	PerSecond float64       // logins at each backend per second, IMAP and ManageSieve each one; 0: no limit
	Timeout   time.Duration // for one user; default one minute
}

// Comparer compares what two backends hold. It is safe for concurrent use; one
// Comparer is best kept for a whole switch, because it remembers where the
// proxy user's credentials were accepted.
type Comparer struct {
	pool    *backendpool.Pool
	options Options

	mu     sync.Mutex
	next   map[string]time.Time // by backend: when the next login may be
	proven map[string]string    // by backend: the password that was accepted
}

// New makes a Comparer for backends of pool.
func New(pool *backendpool.Pool, options Options) *Comparer {
	if options.Parallel <= 0 {
		options.Parallel = 8
	}
	if options.Timeout <= 0 {
		options.Timeout = time.Minute
	}
	return &Comparer{pool: pool, options: options, next: map[string]time.Time{}, proven: map[string]string{}}
}

// Difference is one thing in which two members differ. From is what the old
// member has, To the new one; empty means that it has nothing.
type Difference struct {
	User    string
	Mailbox string // empty for what belongs to no mailbox
	What    string // "mailbox", "status", "flags", "subscription", "ACL", "quota", "limits of …", "script …", "active script", "login"
	From    string
	To      string
}

// String is one line, for an operator.
func (d Difference) String() string {
	where := d.User
	if d.Mailbox != "" {
		where += fmt.Sprintf(", mailbox %q", d.Mailbox)
	}
	has := func(s string) string {
		if s == "" {
			return "nothing"
		}
		return s
	}
	return fmt.Sprintf("%s: %s: %s on the old member, %s on the new one", where, d.What, has(d.From), has(d.To))
}

// cut bounds what is said of one thing, and keeps it on one line.
func cut(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}, s)
	if len(s) > inWords {
		s = strings.ToValidUTF8(s[:inWords], "") + "…"
	}
	return s
}

// Report is the outcome of a comparison.
type Report struct {
	// Equal is how many users are the same on both, Refused ones not counted.
	Equal int
	// Unequal are all users that differ or could not be compared, sorted.
	Unequal []string
	// Unasked are the users that the comparison has not come to: with Unequal,
	// what is to be compared again.
	Unasked []string
	// Begun is how long it took until the last of the others was begun: one user who
	// takes long does not count.
	Begun time.Duration
	// Differences are the first 20 of Count, at most three of one user.
	Differences []Difference
	Count       int
	// Refused are users whose login both members refuse: unknown to both, or
	// suspended. Nothing of theirs was compared.
	Refused []string
	// Skipped is what was not compared of somebody, because one of the members
	// does not offer it: "ACLs", "quota", "sieve scripts". Sorted.
	Skipped []string
}

// Err is nil if the users that could be compared are equal; else it says, on
// one line, how many differences there are, and names three: of three users, if
// so many differ.
func (r *Report) Err() error {
	if r.Count == 0 {
		return nil
	}
	var words, rest []string
	last := ""
	for _, d := range r.Differences {
		if d.User != last && len(words) < spelled {
			words = append(words, cut(d.String()))
		} else {
			rest = append(rest, cut(d.String()))
		}
		last = d.User
	}
	words = append(words, rest[:min(len(rest), spelled-len(words))]...)
	if more := r.Count - len(words); more > 0 {
		words = append(words, fmt.Sprintf("and %d more", more))
	}
	return fmt.Errorf("users that differ: %d, differences: %d: %s", len(r.Unequal), r.Count, strings.Join(words, "; "))
}

// String says on one line what was compared.
func (r *Report) String() string {
	text := fmt.Sprintf("users compared: %d equal, %d not", r.Equal, len(r.Unequal))
	if len(r.Unasked) > 0 {
		text += fmt.Sprintf(", %d not come to", len(r.Unasked))
	}
	if len(r.Refused) > 0 {
		text += fmt.Sprintf(", %d that both refuse", len(r.Refused))
	}
	if len(r.Skipped) > 0 {
		text += "; not compared: " + strings.Join(r.Skipped, ", ")
	}
	return text
}

// Compare compares users, whose names are as the backends get them. Members are
// equal if both the error and the Report's Err are nil.
//
// An error says that something could not be told; the Report, never nil, has
// what was found until then, and each user in one of its lists, or counted as
// equal. Users that could not be compared are in Unequal; after 20 of them Compare
// gives up. It returns when all is done, or soon after ctx ends.
func (c *Comparer) Compare(ctx context.Context, from, to *backendpool.Backend, users []string) (*Report, error) {
	for _, b := range []*backendpool.Backend{from, to} {
		if b.Style == backendpool.StyleReplay {
			return &Report{Unasked: users}, fmt.Errorf("backend %s has login style replay: without a proxy user nobody can look into its mailboxes", b.Name)
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	t := tally{giveUp: cancel}
	queue := make(chan string)
	var workers sync.WaitGroup
	for range min(c.options.Parallel, len(users)) {
		workers.Go(func() {
			for user := range queue {
				t.add(user, c.compareUser(ctx, from, to, user))
			}
		})
	}
	began := time.Now()
feed:
	for i, user := range users {
		select {
		case queue <- user:
		case <-ctx.Done():
			t.report.Unasked = users[i:]
			break feed
		}
	}
	t.report.Begun = time.Since(began)
	close(queue)
	workers.Wait()
	return t.end(ctx, c, from, to)
}

// outcome is what the comparison of one user came to.
type outcome struct {
	differences []Difference
	refused     bool
	skipped     []string
	err         error
}

// tally adds outcomes up.
type tally struct {
	giveUp context.CancelCauseFunc

	mu       sync.Mutex
	report   Report
	failures []error
	failed   int
}

func (t *tally) add(user string, o outcome) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r := &t.report
	r.Count += len(o.differences)
	for _, what := range o.skipped {
		if !slices.Contains(r.Skipped, what) {
			r.Skipped = append(r.Skipped, what)
		}
	}
	r.Differences = append(r.Differences, o.differences[:min(len(o.differences), spelled, most-len(r.Differences))]...)
	switch {
	case o.err != nil:
		if t.failed++; t.failed == most {
			t.giveUp(fmt.Errorf("given up after %d users that could not be compared", most))
		}
		if len(t.failures) < most {
			t.failures = append(t.failures, fmt.Errorf("%s: %w", user, o.err))
		}
		r.Unequal = append(r.Unequal, user)
	case o.refused:
		r.Refused = append(r.Refused, user)
	case len(o.differences) > 0:
		r.Unequal = append(r.Unequal, user)
	default:
		r.Equal++
	}
}

// end completes the report. That both refuse a user means nothing unless the
// proxy user's credentials are good on both.
func (t *tally) end(ctx context.Context, c *Comparer, from, to *backendpool.Backend) (*Report, error) {
	r, unproven := &t.report, false
	for _, b := range []*backendpool.Backend{from, to} {
		if len(r.Refused) > 0 && !c.isProven(b) {
			unproven = true
			t.failures = append(t.failures, fmt.Errorf(
				"backend %s refused %s and accepted nobody: nothing shows that login.user and its password are good", b.Name, slices.Min(r.Refused)))
		}
	}
	if unproven {
		r.Unequal, r.Refused = append(r.Unequal, r.Refused...), nil
	}
	slices.Sort(r.Unequal)
	slices.Sort(r.Refused)
	slices.Sort(r.Skipped)
	slices.SortStableFunc(r.Differences, func(x, y Difference) int { return strings.Compare(x.User, y.User) })
	if err := context.Cause(ctx); err != nil {
		return r, errors.Join(append([]error{err}, t.failures...)...)
	}
	return r, errors.Join(t.failures...)
}

// compareUser compares one user. The connections are closed when it returns.
func (c *Comparer) compareUser(ctx context.Context, from, to *backendpool.Backend, user string) outcome {
	ctx, cancel := context.WithTimeout(ctx, c.options.Timeout)
	defer cancel()
	o := c.compareBoth(ctx, [2]*backendpool.Backend{from, to}, user)
	if o.err != nil && ctx.Err() != nil {
		// The connections were closed under the client: what it says of that
		// is not the reason.
		o.err = ctx.Err()
	}
	return o
}

func (c *Comparer) compareBoth(ctx context.Context, members [2]*backendpool.Backend, user string) outcome {
	var (
		sessions [2]*imapSession
		refused  [2]bool
		found    [2]holdings
	)
	defer func() {
		for _, s := range sessions {
			if s != nil {
				s.close()
			}
		}
	}()
	err := onBoth(func(i int) (err error) {
		sessions[i], err = c.openIMAP(ctx, members[i], user)
		if refused[i] = errors.Is(err, errRefused); refused[i] {
			return nil
		}
		return err
	})
	switch {
	case err != nil:
		return outcome{err: err}
	case refused[0] && refused[1]:
		return outcome{refused: true}
	case refused[0] || refused[1]:
		word := map[bool]string{false: "accepted", true: "refused"}
		return outcome{differences: []Difference{{User: user, What: "login", From: word[refused[0]], To: word[refused[1]]}}}
	}

	scope := scopeOf(sessions)
	err = onBoth(func(i int) (err error) {
		// Cyrus has a user without any mailbox, but lets nobody see scripts then.
		if found[i], err = sessions[i].holdings(scope); err == nil && scope.sieve && len(found[i]) > 0 {
			err = c.addScripts(ctx, members[i], sessions[i].sieve, user, found[i])
		}
		return err
	})
	if err != nil {
		return outcome{err: err}
	}
	differences := difference(user, found[0], found[1])
	if !scope.modSeq {
		flags, err := compareFlags(user, sessions, found)
		if err != nil {
			return outcome{err: err}
		}
		differences = append(differences, flags...)
	}
	err = onBoth(func(i int) error { return sessions[i].logOut() })
	return outcome{differences: differences, skipped: scope.skipped(), err: err}
}

// onBoth calls f for the old member (0) and the new one (1) at the same time.
func onBoth(f func(i int) error) error {
	var errs [2]error
	var other sync.WaitGroup
	other.Go(func() { errs[1] = f(1) })
	errs[0] = f(0)
	other.Wait()
	return errors.Join(errs[:]...)
}

// takeTurn waits until the backend may be asked for one more login.
func (c *Comparer) takeTurn(ctx context.Context, b *backendpool.Backend) error {
	if c.options.PerSecond <= 0 {
		return ctx.Err()
	}
	c.mu.Lock()
	turn := c.next[b.Name]
	if now := time.Now(); turn.Before(now) {
		turn = now
	}
	c.next[b.Name] = turn.Add(time.Duration(float64(time.Second) / c.options.PerSecond))
	c.mu.Unlock()
	wait := time.NewTimer(time.Until(turn))
	defer wait.Stop()
	select {
	case <-wait.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// prove remembers that the backend has accepted the proxy user's password.
func (c *Comparer) prove(b *backendpool.Backend, password string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.proven[b.Name] = password
}

func (c *Comparer) isProven(b *backendpool.Backend) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	password, ok := c.proven[b.Name]
	return ok && password == b.Password()
}

// credentials are SASL PLAIN's for user.
func credentials(b *backendpool.Backend, user, password string) (_, _, _ string) {
	if b.Style == backendpool.StyleMasterUser {
		return "", user + "*" + b.User, password
	}
	return user, b.User, password
}
