package filestore

import (
	"context"
	"fmt"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

const (
	frontends = statedir.Frontends
	goneKept  = statedir.GoneKept
)

// Join implements routing.Store. The ID lives until Close or until the
// process has ended, however it ends; a child that is started meanwhile does
// not keep it alive. An ID has 1 to 200 letters, digits and ._@:- in it.
func (s *Store) Join(ctx context.Context, id string) error {
	if err := statedir.CheckID(id); err != nil {
		return err
	}
	// Exclusive: between its creation and its flock nobody may probe the file.
	l, err := s.lock(ctx, tableLock, statedir.Exclusive)
	if err != nil {
		return err
	}
	defer l.Unlock()
	state, err := s.loadLocked()
	if err != nil {
		return err
	}
	isRegistered := func(id string) bool {
		_, ok := state.Frontends[id]
		return ok
	}
	if isRegistered(id) {
		return fmt.Errorf("frontend ID %s is registered already", id)
	}
	alive, err := s.dir.CreateFrontend(id, isRegistered)
	if err != nil {
		return err
	}
	_, err = s.keep(alive)
	return err
}

func (s *Store) loadLocked() (*routing.State, error) {
	raw, err := s.readLocked()
	if err != nil {
		return nil, err
	}
	return decode(raw)
}

// Gone implements routing.Store: the lock of one that has ended can be had. An
// ID without a lock file proves nothing.
func (s *Store) Gone(ctx context.Context, ids []string) ([]string, error) {
	return s.probe(ctx, ids, false)
}

// Alive implements routing.Store: the lock is held.
func (s *Store) Alive(ctx context.Context, ids []string) ([]string, error) {
	return s.probe(ctx, ids, true)
}

// probe returns those of ids whose lock is held, or is not.
func (s *Store) probe(ctx context.Context, ids []string, isHeld bool) ([]string, error) {
	l, err := s.lock(ctx, tableLock, statedir.Shared)
	if err != nil {
		return nil, err
	}
	defer l.Unlock()
	return s.dir.ProbeFrontends(ids, isHeld)
}
