package auth

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/go-crypt/crypt/algorithm/bcrypt"
	"github.com/go-crypt/crypt/algorithm/shacrypt"
)

// FileOptions say how a File judges. The zero value is usable.
type FileOptions struct {
	// Names gives login names their canonical spelling, those in the file too.
	Names Normalizer
	// Masters may act as any other user, with their own password. A master
	// needs a line in the file like everybody else.
	Masters []string
}

// File verifies against a file of Dovecot passwd-file lines
//
//	user:{SCHEME}hash[:uid:gid:gecos:home:shell:extra]
//
// with the schemes PLAIN, SHA512-CRYPT and BLF-CRYPT, and CRYPT (also without
// {SCHEME}) for $6$ and $2a$, $2b$, $2y$. Empty lines and lines that begin with
// # count for nothing; a hash that begins with ! or * locks the account.
// Everything behind the hash is ignored, except extra fields that would have
// to keep somebody out (nologin, allow_nets, …): those are refused.
//
// A File is safe for concurrent use. At most GOMAXPROCS hashes are computed
// at a time; further callers wait, as long as their context lets them.
type File struct {
	path    string
	names   Normalizer
	masters map[string]bool
	hashing chan struct{}

	reload sync.Mutex // one Reload at a time; Verify takes no lock
	users  atomic.Pointer[snapshot]
}

// snapshot is the content of the file; never edited.
type snapshot struct {
	secrets map[string]secret
	// decoy is checked for a user that does not exist. It is of the kind that
	// most users have, so that for a file of one kind the times are alike.
	decoy secret
}

// OpenFile loads the file at path. Its errors are those of Reload, and one for
// each of o.Masters that is no user name.
func OpenFile(path string, o FileOptions) (*File, error) {
	f := &File{
		path:    path,
		names:   o.Names,
		masters: make(map[string]bool),
		hashing: make(chan struct{}, runtime.GOMAXPROCS(0)),
	}
	var errs []error
	for _, name := range o.Masters {
		master, err := f.names.Normalize(name)
		if err != nil {
			errs = append(errs, fmt.Errorf("master %q: %w", name, err))
		}
		f.masters[master] = true
	}
	if err := errors.Join(append(errs, f.Reload())...); err != nil {
		return nil, err
	}
	return f, nil
}

// Reload reads the file again. If anything is wrong with it nothing changes,
// and the error joins one error per fault, each `path:line: what; what to do`,
// without a secret. A file without any user is a fault: it is far more likely
// half-written than meant.
func (f *File) Reload() error {
	f.reload.Lock()
	defer f.reload.Unlock()
	content, err := os.ReadFile(f.path)
	if err != nil {
		return fmt.Errorf("passwd-file: %w", err)
	}
	users, err := parsePasswd(f.path, content, f.names)
	if err != nil {
		return err
	}
	f.users.Store(users)
	return nil
}

// Users is the number of users in the file.
func (f *File) Users() int { return len(f.users.Load().secrets) }

// Verify checks the password first and the authzid afterwards, so that only
// who knows a password learns who is a master.
func (f *File) Verify(ctx context.Context, c Credentials) (Identity, error) {
	c, err := c.normalised(f.names)
	if err != nil && !errors.Is(err, ErrNotAuthorized) {
		return Identity{}, err
	}
	unauthorized := err

	users := f.users.Load()
	stored, known := users.secrets[c.Authcid]
	if !known || stored.kind.scheme == schemeLocked {
		stored, known = users.decoy, false
	}
	ok, why, err := f.check(ctx, stored, c.Password)
	switch {
	case err != nil:
		return Identity{}, err
	case !known || !ok:
		if why != "" {
			return Identity{}, fmt.Errorf("%w (%s)", ErrCredentials, why)
		}
		return Identity{}, ErrCredentials
	case unauthorized != nil:
		return Identity{}, unauthorized
	case c.Authzid != "" && !f.masters[c.Authcid]:
		return Identity{}, ErrNotAuthorized
	}
	return c.identity(true), nil
}

// check runs one comparison, within the bound on hashes at a time.
func (f *File) check(ctx context.Context, s secret, password string) (ok bool, why string, err error) {
	if err := ctx.Err(); err != nil {
		return false, "", fmt.Errorf("checking a password: %w", err)
	}
	select {
	case f.hashing <- struct{}{}:
		defer func() { <-f.hashing }()
		return s.matches(password)
	case <-ctx.Done():
		return false, "", fmt.Errorf("waiting to check a password: %w", context.Cause(ctx))
	}
}

// parsePasswd parses a whole file; path is only for messages. The error joins
// all that is wrong, in the order of lines.
func parsePasswd(path string, content []byte, names Normalizer) (*snapshot, error) {
	users := &snapshot{secrets: make(map[string]secret)}
	first := make(map[string]int) // line of each user
	var errs []error
	number := 0
	for line := range bytes.Lines(content) {
		number++
		e, ok, err := parseLine(strings.TrimSuffix(string(line), "\n"), names)
		if before, twice := first[e.user]; ok && twice {
			err = fmt.Errorf("the same user as in line %d; delete one of them", before)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("%s:%d: %w", path, number, err))
			continue
		}
		if ok {
			first[e.user] = number
			users.secrets[e.user] = e.secret
		}
	}
	if len(first) == 0 && len(errs) == 0 {
		errs = append(errs, fmt.Errorf("%s:%d: no users; write one line user:{SCHEME}hash for each", path, max(number, 1)))
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	users.decoy = newDecoy(users.secrets)
	return users, nil
}

// newDecoy makes a secret of the kind that most of secrets have, the costlier
// one where two are equally frequent.
func newDecoy(secrets map[string]secret) secret {
	count := make(map[kind]int)
	for _, s := range secrets {
		if s.kind.scheme != schemeLocked {
			count[s.kind]++
		}
	}
	kinds := []kind{{scheme: schemePlain}}
	for k := range count {
		kinds = append(kinds, k)
	}
	typical := slices.MaxFunc(kinds, func(a, b kind) int {
		if count[a] != count[b] {
			return count[a] - count[b]
		}
		return a.work() - b.work()
	})
	return decoyOf(typical)
}

// decoyOf makes a secret of kind k. What it stores does not matter, as a match
// is discarded.
func decoyOf(k kind) secret {
	s := secret{kind: k}
	var err error
	switch k.scheme {
	case schemeSHA512:
		s.digest, err = shacrypt.Decode(fmt.Sprintf("$6$rounds=%d$posthouse.decoy.$%s", k.cost, strings.Repeat(".", 86)))
	case schemeBcrypt:
		s.digest, err = bcrypt.Decode(fmt.Sprintf("$2y$%02d$%s", k.cost, strings.Repeat(".", 53)))
	}
	if err != nil {
		panic("auth: decoy of a kind that was loaded before: " + err.Error())
	}
	return s
}
