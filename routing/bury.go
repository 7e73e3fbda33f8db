package routing

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
)

// How often a frontend asks the store which others have ended.
const (
	askOften  = time.Second     // while a role is held or to be: a dead frontend would be waited for
	askSeldom = 5 * time.Second // otherwise
)

// buryOthers ends the registrations of frontends that are proven to have ended,
// until ctx ends. Every frontend does it, not the driver alone: only who is on
// the same machine may have the proof.
func (t *Table) buryOthers(ctx context.Context) {
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
		if err := t.buryGone(ctx); err != nil && ctx.Err() == nil {
			t.log.Error("looking for frontends that have ended; trying again", zap.Error(err))
		}
	}
}

func (t *Table) buryGone(ctx context.Context) error {
	own := t.ID()
	var others []string
	for _, id := range sortedKeys(t.Snapshot().Frontends) {
		if id != own {
			others = append(others, id)
		}
	}
	if len(others) == 0 {
		return nil
	}
	gone, err := t.opt.Store.Gone(ctx, others)
	if err != nil {
		return fmt.Errorf("asking which frontends have ended: %w", err)
	}
	for _, id := range gone {
		s, err := t.opt.Store.Update(ctx, func(s *State) error { return t.rules.bury(s, id, time.Now()) })
		switch {
		case errors.Is(err, errNothing): // another was faster
		case err != nil:
			return fmt.Errorf("burying frontend %s: %w", id, err)
		default:
			t.install(s, false)
			t.emit(Event{Kind: EventBuried, Frontend: id})
		}
	}
	return nil
}

func (t *Table) askEvery() time.Duration {
	for _, row := range t.Snapshot().Roles {
		if row.Switch != nil || row.Request != nil {
			return askOften
		}
	}
	return askSeldom
}
