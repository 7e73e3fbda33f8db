package statedir

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const (
	// Frontends is the directory, within a Dir, of the lock files ID.lock that
	// the frontends of this machine hold for as long as they live.
	Frontends = "frontends"

	// GoneKept lock files of frontends that have ended stay, so that their IDs
	// are refused. Of older ones nothing is left: the nonce in an ID keeps it
	// from coming back.
	GoneKept = 1000
)

// An ID names a file.
var validID = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@:-]{0,199}$`)

// CheckID refuses what cannot be a frontend's ID: it has 1 to 200 letters,
// digits and ._@:- in it.
func CheckID(id string) error {
	if !validID.MatchString(id) {
		return fmt.Errorf("frontend ID %q is not 1 to 200 of A-Z a-z 0-9 . _ @ : -", id)
	}
	return nil
}

func frontendLock(id string) string { return filepath.Join(Frontends, id+".lock") }

// CreateFrontend makes the lock file of a frontend whose ID was never used on
// this machine, and holds it. Once there are more than GoneKept, the oldest
// files of those who are gone, and of whom isRegistered is false, are removed.
// The caller holds another lock exclusively, the one with which siblings call
// ProbeFrontends, so that nobody probes between the file and its flock.
func (d *Dir) CreateFrontend(id string, isRegistered func(id string) bool) (*Lock, error) {
	if err := CheckID(id); err != nil {
		return nil, err
	}
	if err := os.Mkdir(d.join(Frontends), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	alive, err := d.CreateLock(frontendLock(id))
	if errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("frontend ID %s was used before", id)
	}
	if err != nil {
		return nil, err
	}
	if err := d.sweepFrontends(isRegistered, id); err != nil {
		alive.Unlock()
		return nil, err
	}
	return alive, nil
}

// sweepFrontends removes the oldest lock files of those who are gone and no
// longer registered, and makes the directory durable: after a power loss the
// file of a registered frontend must be there to prove that it has ended.
func (d *Dir) sweepFrontends(isRegistered func(id string) bool, joining string) error {
	dir, err := os.Open(d.join(Frontends))
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
	for i := range max(0, len(infos)-GoneKept) {
		id, ok := strings.CutSuffix(infos[i].Name(), ".lock")
		if !ok || id == joining || isRegistered(id) {
			continue
		}
		if held, err := d.IsHeld(frontendLock(id)); held || err != nil {
			continue
		}
		if err := os.Remove(filepath.Join(dir.Name(), infos[i].Name())); err != nil {
			return err
		}
	}
	return dir.Sync()
}

// ProbeFrontends returns those of ids whose frontend has a lock file here that
// is held, or that is not. The caller holds the lock of CreateFrontend shared.
func (d *Dir) ProbeFrontends(ids []string, isHeld bool) ([]string, error) {
	var found []string
	for _, id := range ids {
		if CheckID(id) != nil {
			continue
		}
		held, err := d.IsHeld(frontendLock(id))
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
