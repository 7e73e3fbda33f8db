package routing

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"time"

	"go.uber.org/zap"
)

// Comparer is what Hooks may be besides: it compares the members of a role while
// the role is open, so that in HOLD only those users are left to be looked at
// who had a stay since.
type Comparer interface {
	// Compares says whether the site wants roles like this one compared.
	Compares(role string) bool
	// Compare compares call.Seen's users on call.From and call.To. err says that
	// the switch would not come to its end now, and why. It returns soon after
	// ctx has ended, and nothing of it runs any more then.
	Compare(ctx context.Context, call HookCall) (Compared, error)
}

// Compared is what a comparison has found.
type Compared struct {
	Left  Seen   // who was not equal
	Found string // the outcome in words
	Users int    // that were to be compared
	// PerUser is how long it took for each user, many being compared at a time; 0
	// if there were too few to tell.
	PerUser time.Duration
}

// Comparison is one of a Request: whose mail, and how it ended.
type Comparison struct {
	// Of was taken out of Row.Seen when the comparison began: what is seen from
	// then on is newer than it.
	Of Seen `json:"of,omitzero"`
	// Driver is who has begun it.
	Driver string `json:"driver,omitempty"`
	// Found is the outcome in words; empty until there is one.
	Found string    `json:"found,omitempty"`
	Ended time.Time `json:"ended,omitzero"`
	// Failed: the switch is refused for what was found.
	Failed bool `json:"failed,omitempty"`
	// Room is an estimate of how many users can be compared in HOLD at the very most:
	// at four times the pace of this one, for the servers have nothing else to do then;
	// 0 if there is none.
	Room int `json:"room,omitempty"`
	// Everybody is how many users there are; 0 if that is not known.
	Everybody int `json:"everybody,omitempty"`
}

// compareTimeout bounds a comparison before HOLD.
const compareTimeout = time.Hour

// compare begins the comparison of a request, or begins it anew: every frontend
// has handed in whom it has seen, and has begun to note anew who is seen.
func (r rules) compare(s *State, role string, number uint64, driver string) error {
	row, err := s.requested(role, number)
	if err != nil {
		return err
	}
	q := *row.Request
	if c := q.Comparison; c != nil && c.Found != "" {
		return fmt.Errorf("%w: role %s: the comparison of switch %d has ended", ErrConflict, role, number)
	}
	row.endComparison() // of a driver that is no more
	q.Comparison = &Comparison{Of: row.Seen, Driver: driver}
	// What may run on unseen may do so behind the comparison, and be taken to
	// have ended before that is over.
	row.Request, row.Seen = &q, seenIn(row.Residues)
	s.Roles[role] = row
	return nil
}

// compared ends it: left are those that have to be looked at once more, as do
// those whose work may run on unseen; all, if it failed. It may have taken an hour:
// every frontend reports anew.
func (r rules) compared(s *State, role string, number uint64, left Seen, c Comparison) error {
	row, err := s.requested(role, number)
	if err != nil {
		return err
	}
	q := *row.Request
	if q.Comparison == nil || q.Comparison.Found != "" || q.Comparison.Driver != c.Driver {
		return fmt.Errorf("%w: role %s: this is not the comparison of switch %d", ErrConflict, role, number)
	}
	if c.Failed {
		row.endComparison()
	}
	row.Seen = row.Seen.merge(left).merge(seenIn(row.Residues))
	q.Comparison, q.Reports = &c, nil
	row.Request = &q
	s.Roles[role] = row
	return nil
}

// tooMany says that the users who will have to be compared in HOLD are more than
// there will be room for: those who were seen since the comparison, and those who are
// inside. Nobody knows who is inside at several frontends: the most at one counts.
func (s *State) tooMany(q *Request) string {
	if q.Comparison == nil || q.Comparison.Room == 0 {
		return ""
	}
	var seen Seen
	for _, role := range q.Roles {
		seen = seen.merge(s.Roles[role].Seen)
	}
	c := q.Comparison
	if seen.All && c.Everybody > c.Room {
		return fmt.Sprintf("it is not known whose mail may have changed since the comparison (a residue of nobody knows whom, see `posthouse roles`, or more than "+
			"%d users): in HOLD everybody is compared, and limits.switch_budget has time for some %d of %d users", mostSeen, c.Room, c.Everybody)
	}
	users := len(seen.Users)
	for _, r := range q.Reports {
		users = max(users, r.Users)
	}
	if users > c.Room {
		return fmt.Sprintf("%d users or more are inside, or were since the comparison: in HOLD these are compared, and limits.switch_budget has time for some %d: "+
			"switch when fewer are inside", users, c.Room)
	}
	return ""
}

// seenIn are the users of residues.
func seenIn(residues []Residue) Seen {
	var seen Seen
	for _, res := range residues {
		if res.User == "" {
			return Seen{All: true}
		}
		seen.Users = append(seen.Users, res.User)
	}
	return seen.merge(Seen{})
}

// endComparison puts those back whose comparison did not come to its end.
func (row *Row) endComparison() {
	if q := row.Request; q != nil && q.Comparison != nil {
		row.Seen = row.Seen.merge(q.Comparison.Of)
	}
}

// asking is what a driver remembers of a request.
type asking struct {
	since  time.Time          // when this process saw it, or its comparison ended
	cancel context.CancelFunc // of the comparison at work
	// compares: a comparison of this driver has begun; if another driver's stands
	// in the row now, that one came later.
	compares bool
}

// compareEnd is how a comparison ended.
type compareEnd struct {
	number uint64
	roles  []string
	all    bool // users were to be compared
	found  Compared
	err    error
}

// wantsComparison says whether a request's members are to be compared before it
// goes on.
func (d *driver) wantsComparison(role string, q *Request) bool {
	return d.t.compares(role) && (q.Comparison == nil || q.Comparison.Found == "")
}

func (t *Table) compares(role string) bool {
	c, ok := t.opt.Hooks.(Comparer)
	return ok && c.Compares(role)
}

// runComparison begins a comparison; comparisonEnded hears of its end.
func (d *driver) runComparison(ctx context.Context, s *State, role string, mine *asking) (bool, error) {
	q := s.Roles[role].Request
	did, err := d.commit(ctx, q.Roles, "comparing", func(s *State, role string) error { return d.t.rules.compare(s, role, q.Number, d.token) })
	if !did || err != nil {
		return did, err
	}
	s = d.t.Snapshot()
	row := s.Roles[role]
	if row.Request == nil || row.Request.Number != q.Number {
		return true, nil // it was taken back
	}
	call := HookCall{Hook: HookCatchUp, Roles: q.Roles, From: row.Active, To: q.To, Number: q.Number, Epoch: row.Epoch}
	for _, role := range q.Roles {
		if with := s.Roles[role].Request; with != nil && with.Comparison != nil {
			call.Seen = call.Seen.merge(with.Comparison.Of)
		}
	}
	limit := compareTimeout
	if q.PlanOnly {
		limit = planKept // nobody takes it later
	}
	running, cancel := context.WithTimeout(ctx, limit)
	mine.cancel, mine.compares = cancel, true
	d.t.log.Info("comparing before HOLD", zap.Strings("roles", q.Roles), zap.Uint64("switch", q.Number),
		zap.Bool("all", call.Seen.All), zap.Int("users", len(call.Seen.Users)))
	d.running.Go(func() {
		defer cancel()
		end := compareEnd{number: q.Number, roles: q.Roles, all: call.Seen.All}
		end.found, end.err = d.t.opt.Hooks.(Comparer).Compare(running, call)
		select {
		case d.comparisons <- end:
		case <-ctx.Done():
		}
	})
	return true, nil
}

// comparisonEnded writes down what a comparison has found; what follows from it
// is the next step.
func (d *driver) comparisonEnded(ctx context.Context, end compareEnd) {
	mine := d.requests[end.number]
	if mine == nil {
		return // the request was taken back
	}
	now := time.Now()
	mine.cancel, mine.since = nil, now
	c := Comparison{Found: cmp.Or(end.found.Found, "nothing to compare"), Ended: now, Driver: d.token}
	switch {
	case end.err != nil:
		c.Found, c.Failed = end.err.Error(), true
	case end.found.PerUser > 0:
		c.Room = max(1, int(4*d.t.opt.SwitchBudget/end.found.PerUser))
	}
	if end.all {
		c.Everybody = end.found.Users
	}
	d.t.log.Info("compared before HOLD", zap.Strings("roles", end.roles), zap.Uint64("switch", end.number), zap.String("found", c.Found), zap.Bool("failed", c.Failed))
	if _, err := d.commit(ctx, end.roles, "comparison", func(s *State, role string) error {
		return d.t.rules.compared(s, role, end.number, end.found.Left, c)
	}); err != nil {
		d.t.log.Error("writing down what a comparison has found; it is made again", zap.Error(err))
	}
}

// forgetRequests drops those that are no more, and ends their comparisons.
func (d *driver) forgetRequests(open map[uint64]bool) {
	maps.DeleteFunc(d.requests, func(number uint64, mine *asking) bool {
		if !open[number] && mine.cancel != nil {
			mine.cancel()
		}
		return !open[number]
	})
}
