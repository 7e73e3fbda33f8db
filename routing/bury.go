package routing

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.uber.org/zap"
)

// How often a frontend asks the store which others have ended.
const (
	askOften  = time.Second     // while a role is held or to be: a dead frontend would be waited for
	askSeldom = 5 * time.Second // otherwise
)

// buryGone ends the registrations of frontends that are proven to have ended,
// until ctx ends. Every frontend does it, not the driver alone: only who is on
// the same machine may have the proof. Who sees that it was itself said to have
// ended buries itself: its sessions drain, and it registers anew.
func (t *Table) buryGone(ctx context.Context) {
	last := time.Now()
	for ctx.Err() == nil {
		changed := t.Changed()
		timer := time.NewTimer(t.askEvery() - time.Since(last))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-changed: // perhaps it is to be asked more often now
			timer.Stop()
			continue
		case <-timer.C:
		}
		last = time.Now()
		before := t.view.Load()
		s, err := t.bury(ctx, before.state)
		if err != nil && ctx.Err() == nil {
			t.log.Error("looking for frontends that have ended; trying again", zap.Error(err))
		}
		if s != nil {
			t.install(s, before, false)
		}
	}
}

// bury ends the registrations of those in known that have ended. It returns the
// table without them; nil if there was none.
func (t *Table) bury(ctx context.Context, known *State) (*State, error) {
	if len(known.Frontends) == 0 {
		return nil, nil
	}
	gone, err := t.opt.Store.Gone(ctx, sortedKeys(known.Frontends))
	if err != nil {
		return nil, fmt.Errorf("asking which frontends have ended: %w", err)
	}
	if len(gone) == 0 {
		return nil, nil
	}
	var buried []string
	now := time.Now()
	s, err := t.opt.Store.Update(ctx, func(s *State) error {
		buried = nil
		for _, id := range gone {
			switch err := t.rules.bury(s, id, now); {
			case err == nil:
				buried = append(buried, id)
			case !errors.Is(err, errNothing): // another was faster
				return err
			}
		}
		if len(buried) == 0 {
			return errNothing
		}
		return nil
	})
	if errors.Is(err, errNothing) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("burying frontends %s: %w", strings.Join(gone, ", "), err)
	}
	for _, id := range buried {
		t.emit(Event{Kind: EventBuried, Frontend: id})
	}
	return s, nil
}

func (t *Table) askEvery() time.Duration {
	for _, row := range t.Snapshot().Roles {
		if row.Switch != nil || row.Request != nil {
			return askOften
		}
	}
	return askSeldom
}
