package filestore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/posthouse/posthouse/routing"
	"github.com/posthouse/posthouse/routing/statedir"
)

const (
	frontends = "frontends"

	// goneKept lock files of frontends that have ended stay, so that their IDs
	// are refused. Of older ones nothing is left: the nonce in an ID keeps it
	// from coming back.
	goneKept = 1000
)

// An ID names a file.
var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@:-]{0,199}$`)

func lockOf(id string) string { return filepath.Join(frontends, id+".lock") }

// Join implements routing.Store. The ID lives until Close or until the
// process has ended, however it ends; a child that is started meanwhile does
// not keep it alive. An ID has 1 to 200 letters, digits and ._@:- in it.
func (s *Store) Join(ctx context.Context, id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("frontend ID %q is not 1 to 200 of A-Z a-z 0-9 . _ @ : -", id)
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
	if _, ok := state.Frontends[id]; ok {
		return fmt.Errorf("frontend ID %s is registered already", id)
	}
	alive, err := s.dir.CreateLock(lockOf(id))
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("frontend ID %s was used before", id)
	}
	if err != nil {
		return err
	}
	if err := s.sweep(state, id); err != nil {
		alive.Unlock()
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

// sweep removes the oldest lock files of those who are gone and no longer
// registered, and makes the directory durable: after a power loss the file of
// a registered frontend must be there to prove that it has ended.
func (s *Store) sweep(state *routing.State, joining string) error {
	dir, err := os.Open(filepath.Join(s.dir.Path(), frontends))
	if err != nil {
		return err
	}
	defer dir.Close()
	infos, err := dir.Readdir(-1)
	if err != nil {
		return err
	}
	slices.SortFunc(infos, func(a, b fs.FileInfo) int {
		return cmp.Or(a.ModTime().Compare(b.ModTime()), cmp.Compare(a.Name(), b.Name()))
	})
	for i := range max(0, len(infos)-goneKept) {
		id, ok := strings.CutSuffix(infos[i].Name(), ".lock")
		if _, registered := state.Frontends[id]; !ok || registered || id == joining {
			continue
		}
		if held, err := s.dir.IsHeld(lockOf(id)); held || err != nil {
			continue
		}
		if err := os.Remove(filepath.Join(dir.Name(), infos[i].Name())); err != nil {
			return err
		}
	}
	return dir.Sync()
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
	var found []string
	for _, id := range ids {
		if !validID.MatchString(id) {
			continue
		}
		held, err := s.dir.IsHeld(lockOf(id))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if held == isHeld {
			found = append(found, id)
		}
	}
	return found, nil
}
