package routing

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
)

// Hooks runs the site's programs, which a switch calls in its phases.
type Hooks interface {
	// Run runs a hook to its end; when ctx ends it ends the hook, so that
	// nothing of it runs here any more when Run returns. output is the end of
	// what the hook wrote. ErrTryAgain says that it could not do its work yet.
	Run(ctx context.Context, call HookCall) (output string, err error)
}

// ErrTryAgain is a hook's word that it may succeed if it is run again.
var ErrTryAgain = errors.New("the hook asks to be tried again")

// HookCall is what a hook has to know.
type HookCall struct {
	Hook Hook
	// Roles are switched together, the one that was asked for first; its hooks
	// are meant.
	Roles    []string
	From, To string // From is empty where nobody can be asked: nobody knows it, or it is dead
	Number   uint64
	Epoch    uint64 // that of the first role
	Attempt  int
	// Seen are the users of all the roles whose mail may have changed since
	// their last switch.
	Seen Seen
}

// hookRetryAfter is the pause before a hook is tried again.
const hookRetryAfter = 500 * time.Millisecond

// hookEnd is how a hook ended.
type hookEnd struct {
	number uint64
	run    HookRun
	err    error
	isOld  bool // it is told again
}

// runHook begins a hook that the row announces already. hookEnded hears of its
// end.
func (d *driver) runHook(ctx context.Context, s *State, hook Hook, row Row, mine *driving, left time.Duration) {
	if time.Now().Before(mine.notBefore) {
		return
	}
	if isUndo(hook) || row.canAbort() != "" {
		left = d.t.opt.SwitchBudget // it must be given its time: there is no other way
	}
	from := row.Active
	if row.Switch.Failover && hook == HookPromote {
		from = "" // nobody can be asked there
	}
	call := HookCall{Hook: hook, Roles: mine.roles, From: from, To: row.Switch.To,
		Number: mine.number, Epoch: row.Epoch, Attempt: row.Switch.Attempt}
	for _, role := range mine.roles {
		call.Seen = call.Seen.merge(s.Roles[role].Seen)
	}
	run := HookRun{Hook: hook, Attempt: row.Switch.Attempt, Began: time.Now()}
	running, cancel := context.WithTimeout(ctx, left)
	mine.hook, mine.in, mine.cancel = hook, row.Phase, cancel
	d.t.log.Info("hook begins", zap.String("hook", string(hook)), zap.String("roles", listed(mine.roles)), zap.Uint64("switch", mine.number))
	d.running.Go(func() {
		defer cancel()
		var err error
		if d.t.opt.Hooks == nil {
			err = errors.New("this frontend drives the switch and has no hooks in its configuration")
		} else {
			run.Output, err = d.t.opt.Hooks.Run(running, call)
		}
		run.Took = time.Since(run.Began)
		if err != nil {
			run.Error = err.Error()
		}
		select {
		case d.ended <- hookEnd{number: mine.number, run: run, err: err}:
		case <-ctx.Done():
			d.t.log.Warn("hook ended with its driver's office: who drives the switch next runs it again", zap.String("hook", string(hook)),
				zap.Uint64("switch", mine.number), zap.String("output", run.Output), zap.Error(err))
		}
	})
}

func isUndo(h Hook) bool { return h == HookUndoDemote || h == HookUndoPromote }

// hookEnded writes down how a hook ended; what follows from it is the next step.
func (d *driver) hookEnded(ctx context.Context, end hookEnd) {
	mine, t := d.switches[end.number], d.t
	fields := []zap.Field{zap.String("hook", string(end.run.Hook)), zap.Uint64("switch", end.number),
		zap.Duration("took", end.run.Took)}
	switch {
	case end.isOld:
	case end.err != nil:
		t.log.Error("hook failed", append(fields, zap.Error(end.err))...)
	default:
		t.log.Info("hook done", fields...)
	}
	if mine == nil {
		return
	}
	in := mine.in
	mine.hook, mine.cancel = "", nil
	did, err := d.writeDown(ctx, mine, end)
	row := t.Snapshot().Roles[mine.roles[0]]
	switch {
	case err != nil:
		t.log.Error("writing down how a hook ended; trying again", zap.Error(err))
		d.endsAgain(ctx, mine, end)
	case row.Switch == nil || row.Switch.Number != mine.number:
		delete(d.switches, end.number)
	case row.Phase != in: // on, or aborted under it
	case !did: // refused: what it was to clear stands
		mine.notBefore = time.Now().Add(retryAfter)
	case isUndo(end.run.Hook) && !row.Switch.begun(row.Switch.undoes(end.run.Hook)): // nothing is to be undone any more
		mine.retrying = time.Time{}
	case end.err == nil:
		mine.retrying = time.Time{}
		d.hookDone(mine, row, end.run.Hook)
	case isUndo(end.run.Hook) || row.canAbort() != "":
		d.retry(ctx, mine, end)
	case end.run.Hook == HookProve && (row.Switch.has(HookDemote) || !errors.Is(end.err, ErrTryAgain)):
		mine.proved = true // it has not shown it; the demotion may
	case errors.Is(end.err, ErrTryAgain):
		mine.notBefore = time.Now().Add(hookRetryAfter)
	default:
		mine.failed = fmt.Sprintf("hook %s failed: %s", end.run.Hook, hookError(end.run))
	}
}

// endsAgain has hookEnded told anew, later: what was written may be on its way still,
// and a hook that ran again would be cut off when it arrives.
func (d *driver) endsAgain(ctx context.Context, mine *driving, end hookEnd) {
	end.isOld = true
	mine.hook, mine.cancel = end.run.Hook, func() {}
	d.running.Go(func() {
		if pause(ctx, retryAfter) {
			select {
			case d.ended <- end:
			case <-ctx.Done():
			}
		}
	})
}

// writeDown writes down how a hook ended: with the next phase, if that follows.
func (d *driver) writeDown(ctx context.Context, mine *driving, end hookEnd) (did bool, err error) {
	in := mine.in
	ran := d.own(mine, func(s *State, role string) error {
		if now := s.Roles[role].Phase; now != in && now != PhaseAbort {
			return fmt.Errorf("%w: role %s has gone on to %s", ErrConflict, role, now)
		}
		return d.t.rules.ran(s, role, mine.number, end.run)
	})
	if end.err == nil && !isUndo(end.run.Hook) {
		if did, err = d.goOn(ctx, mine, end.run.Hook, ran); did || err != nil {
			return did, err
		}
	}
	return d.commit(ctx, mine.roles, "hook "+string(end.run.Hook), ran)
}

// goOn writes down that a hook ran and what follows, in one step, if that is the next
// phase: users wait for it.
func (d *driver) goOn(ctx context.Context, mine *driving, hook Hook, ran func(s *State, role string) error) (bool, error) {
	did, err := d.commitAll(ctx, listed(mine.roles)+": hook "+string(hook)+", and the next phase", func(s *State) error {
		if err := each(mine.roles, func(role string) error { return ran(s, role) }); err != nil {
			return err
		}
		next, now := *mine, time.Now()
		row := s.Roles[mine.roles[0]]
		d.hookDone(&next, row, hook)
		if do, why := decide(s, next, d.left(mine, row, now) <= 0, true); do != moveAdvance {
			return fmt.Errorf("%w: not yet: %s", ErrConflict, why)
		}
		return each(mine.roles, func(role string) error { return d.t.rules.advance(s, role, row.Phase, now) })
	})
	if did {
		mine.retrying = time.Time{}
	}
	return did, err
}

func (d *driver) hookDone(mine *driving, row Row, hook Hook) {
	switch {
	case hook == HookProve:
		mine.proved = true
	case isUndo(hook): // not what was begun last: another driver may have been faster
		mine.undone = row.Switch.undoes(hook)
	default:
		mine.ran = row.Phase
	}
}

// retry runs a hook again to which there is no alternative, for as long as a
// switch may take; then the operator has to see to it.
func (d *driver) retry(ctx context.Context, mine *driving, end hookEnd) {
	now := time.Now()
	if mine.retrying.IsZero() {
		mine.retrying = now
	}
	if now.Sub(mine.retrying) < d.t.opt.SwitchBudget {
		mine.notBefore = now.Add(retryAfter)
		return
	}
	mine.retrying = time.Time{}
	why := fmt.Sprintf("hook %s failed: %s; see to it, then `posthouse switch --resume %s`", end.run.Hook, hookError(end.run), mine.roles[0])
	_, err := d.commitStep(ctx, mine, "waiting for the operator", func(s *State, role string) error {
		return d.t.rules.stick(s, role, mine.number, why)
	})
	if err != nil {
		d.t.log.Error("writing down that a switch is stuck", zap.Error(err))
	}
}

// hookError is how a hook failed, with its last line.
func hookError(run HookRun) string {
	lines := strings.Split(strings.TrimSpace(run.Output), "\n")
	if last := lines[len(lines)-1]; last != "" {
		return run.Error + ": " + last
	}
	return run.Error
}

// String is the run in a line, with what it wrote below.
func (run HookRun) String() string {
	text := fmt.Sprintf("%s took %v", run.Hook, run.Took.Round(time.Millisecond))
	if run.Error != "" {
		text += ", FAILED: " + run.Error
	}
	for line := range strings.Lines(run.Output) {
		text += "\n     | " + strings.TrimRight(line, "\n")
	}
	return text
}
