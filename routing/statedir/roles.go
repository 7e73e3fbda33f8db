package statedir

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	rolesName = "roles-last-used"
	rolesLock = "roles-last-used.lock"

	// lineMax bounds a line of the file. RFC 5321 §4.5.3.1.3 allows 254
	// octets in an address; SASL names may be longer.
	lineMax = 2048

	// Lines that later ones made void are worth a rewrite when there are more
	// of them than of valid ones, and enough to matter (about 0.5 MB).
	compactFrom = 10_000
)

// userKey is the first half of the SHA-256 of a user name: 10 million users
// take less than 0.5 GB, and two never meet by chance.
type userKey [16]byte

func keyOf[T string | []byte](user T) userKey {
	sum := sha256.Sum256([]byte(user))
	return userKey(sum[:16])
}

// roles are the roles last used (safety 26): the file, as far as it has been
// read, in memory. The file grows by whole lines at its end, under rolesLock;
// the last line of a user counts. A rewritten file is read anew by all.
type roles struct {
	d    *Dir
	path string

	// adding is held by the one goroutine that appends; a channel, since the
	// wait for it is bounded.
	adding chan struct{}

	mu     sync.RWMutex
	file   *os.File
	inode  uint64
	size   int64 // bytes read so far: whole lines
	lines  int64 // in those bytes, damaged ones too
	last   map[userKey]uint32
	names  []string
	number map[string]uint32

	syncing sync.Mutex
	synced  int64    // bytes of syncedIn that are on the disk
	inFile  *os.File // the file that synced speaks of
}

// Remember returns the role in which user was last. If none is known, role is
// stored first; it is on the disk when Remember returns.
func (d *Dir) Remember(user, role string) (remembered string, err error) {
	r := d.roles
	if remembered, err = r.recall(user); remembered != "" || err != nil {
		return remembered, err
	}
	return r.store(user, role, false)
}

// Recall returns the role in which user was last, "" if none is known. It
// changes nothing.
func (d *Dir) Recall(user string) (role string, err error) { return d.roles.recall(user) }

// Replace makes role the one in which user was last: after a move. It is on
// the disk, and all frontends that share the directory see it, when Replace
// returns.
func (d *Dir) Replace(user, role string) error {
	_, err := d.roles.store(user, role, true)
	return err
}

func openRoles(d *Dir) (*roles, error) {
	r := &roles{d: d, path: d.join(rolesName), adding: make(chan struct{}, 1)}
	ctx, cancel := context.WithTimeout(context.Background(), lockPatience)
	defer cancel()
	l, err := d.Lock(ctx, rolesLock, Exclusive)
	if err != nil {
		return nil, err
	}
	defer l.Unlock()
	if err := r.reopen(); err != nil {
		return nil, err
	}
	err = r.cutTorn()
	if void := r.lines - int64(len(r.last)); void > compactFrom && void > int64(len(r.last)) && err == nil {
		err = r.compact()
	}
	if err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

func (r *roles) close() error { return r.file.Close() }

// recall costs one stat: a sibling may have appended a line, or an operator
// have rewritten the file.
func (r *roles) recall(user string) (string, error) {
	r.mu.RLock()
	news, err := r.hasNews()
	role := r.lookup(user)
	r.mu.RUnlock()
	if err != nil || !news {
		return role, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.catchUp(); err != nil {
		return "", err
	}
	return r.lookup(user), nil
}

func (r *roles) lookup(user string) string {
	if i, ok := r.last[keyOf(user)]; ok {
		return r.names[i]
	}
	return ""
}

// stat returns the inode and the size of the file that is there now; inode 0
// if there is none.
func (r *roles) stat() (inode uint64, size int64, err error) {
	var st unix.Stat_t
	switch err := unix.Stat(r.path, &st); {
	case err == nil:
		return st.Ino, st.Size, nil
	case errors.Is(err, unix.ENOENT):
		return 0, 0, nil
	default:
		return 0, 0, &fs.PathError{Op: "stat", Path: r.path, Err: err}
	}
}

// hasNews says whether the file is another one or holds another number of
// bytes than was read. A torn last line is news each time; the next who
// appends removes it.
func (r *roles) hasNews() (bool, error) {
	inode, size, err := r.stat()
	return inode != r.inode || size != r.size, err
}

// store appends the line of user, unless a role is remembered and may stay.
func (r *roles) store(user, role string, replace bool) (string, error) {
	line := user + "\t" + role + "\n"
	if _, _, err := parseLine([]byte(line[:len(line)-1])); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockPatience)
	defer cancel()
	remembered, err := r.append(ctx, user, role, line, replace)
	if err != nil {
		return "", fmt.Errorf("roles last used: %w", err)
	}
	// What a sibling appended must be on the disk too before anybody acts on it.
	return remembered, r.sync()
}

func (r *roles) append(ctx context.Context, user, role, line string, replace bool) (string, error) {
	select {
	case r.adding <- struct{}{}:
		defer func() { <-r.adding }()
	case <-ctx.Done():
		return "", ctx.Err()
	}
	l, err := r.d.Lock(ctx, rolesLock, Exclusive)
	if err != nil {
		return "", err
	}
	defer l.Unlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.catchUp(); err != nil {
		return "", err
	}
	if err := r.cutTorn(); err != nil {
		return "", err
	}
	if was := r.lookup(user); was != "" && (!replace || was == role) {
		return was, nil
	}
	if _, err := r.file.WriteAt([]byte(line), r.size); err != nil {
		return "", errors.Join(err, r.file.Truncate(r.size))
	}
	r.size += int64(len(line))
	r.lines++
	r.set([]byte(user), []byte(role))
	return role, nil
}

// cutTorn removes the half line that a crash may have left at the end: ended
// by a line end it would be a whole line with the wrong role. The caller holds
// rolesLock and mu and has read all lines.
func (r *roles) cutTorn() error {
	_, size, err := r.stat()
	if err != nil || size == r.size {
		return err
	}
	return r.file.Truncate(r.size)
}

// sync returns when all that was read or written so far is on the disk. Those
// who wait for one fsync share the next.
func (r *roles) sync() error {
	file, want := r.extent()
	r.syncing.Lock()
	defer r.syncing.Unlock()
	if file == r.inFile && want <= r.synced {
		return nil
	}
	file, want = r.extent()
	if err := file.Sync(); err != nil {
		return err
	}
	r.inFile, r.synced = file, want
	return nil
}

func (r *roles) extent() (*os.File, int64) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.file, r.size
}

// catchUp reads what is new. The caller holds mu.
func (r *roles) catchUp() error {
	inode, size, err := r.stat()
	if err != nil {
		return err
	}
	if inode != r.inode || size < r.size {
		return r.reopen()
	}
	return r.read(io.NewSectionReader(r.file, r.size, size-r.size), size-r.size)
}

// reopen reads the file that is there now from its beginning, and creates it
// if there is none. Nothing changes if that fails.
func (r *roles) reopen() error {
	_, err := os.Stat(r.path)
	created := errors.Is(err, fs.ErrNotExist)
	f, err := os.OpenFile(r.path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	fresh := &roles{d: r.d, path: r.path, file: f, last: map[userKey]uint32{}, number: map[string]uint32{}}
	if err := fresh.readAll(created); err != nil {
		f.Close()
		return err
	}
	if r.file != nil {
		// One who is inside sync may still use it: it gets an error, which is
		// the truth about a file that was taken away.
		_ = r.file.Close()
	}
	r.file, r.inode, r.size, r.lines = f, fresh.inode, fresh.size, fresh.lines
	r.last, r.names, r.number = fresh.last, fresh.names, fresh.number
	return nil
}

func (r *roles) readAll(created bool) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(r.file.Fd()), &st); err != nil {
		return &fs.PathError{Op: "fstat", Path: r.file.Name(), Err: err}
	}
	r.inode = st.Ino
	if created {
		if err := r.d.Sync(); err != nil {
			return err
		}
	}
	return r.read(r.file, 1<<16)
}

// read takes whole lines from from, which begins at offset size, until its
// end or an unfinished line. About expected bytes will come.
func (r *roles) read(from io.Reader, expected int64) error {
	buf := bufio.NewReaderSize(from, int(min(max(expected, lineMax+1), 1<<16)))
	for {
		line, length, err := readLine(buf)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		user, role, err := parseLine(line)
		switch {
		case err == nil:
			r.set(user, role)
		case bytes.IndexByte(line, 0) >= 0:
			// What a power loss makes of lines that were never on the disk, and
			// so were never promised to anybody.
		default:
			return r.badLine(err.Error())
		}
		r.size += length
		r.lines++
	}
}

// readLine returns the next line without its end, and its length with it.
// io.EOF if no whole line is left. The line is valid until the next call; one
// that is longer than the buffer comes cut, with its first NUL if it has any.
func readLine(buf *bufio.Reader) (line []byte, length int64, err error) {
	var long []byte
	for {
		line, err = buf.ReadSlice('\n')
		length += int64(len(line))
		switch {
		case err == nil && long == nil:
			return line[:len(line)-1], length, nil
		case err == nil:
			return long, length, nil
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, 0, err
		case long == nil:
			long = bytes.Clone(line)
		}
		if bytes.IndexByte(line, 0) >= 0 {
			long[0] = 0
		}
	}
}

func (r *roles) badLine(why string) error {
	return fmt.Errorf("%s:%d: %s; posthouse did not write this line: correct or remove it",
		r.path, r.lines+1, why)
}

// set is one line. The bytes are not kept.
func (r *roles) set(user, role []byte) {
	i, ok := r.number[string(role)]
	if !ok {
		name := string(role)
		i = uint32(len(r.names))
		r.names, r.number[name] = append(r.names, name), i
	}
	r.last[keyOf(user)] = i
}

var (
	errLineForm  = errors.New("want: user TAB role")
	errLineLong  = fmt.Errorf("user and role are longer than %d bytes", lineMax)
	errLineBytes = errors.New("control character in user or role")
)

// parseLine splits a line without its end.
func parseLine(line []byte) (user, role []byte, err error) {
	user, role, found := bytes.Cut(line, []byte("\t"))
	switch {
	case !found || len(user) == 0 || len(role) == 0:
		return nil, nil, errLineForm
	case len(line) >= lineMax:
		return nil, nil, errLineLong
	case hasControl(user) || hasControl(role):
		return nil, nil, errLineBytes
	}
	return user, role, nil
}

func hasControl(s []byte) bool {
	for _, c := range s {
		if c < ' ' || c == 0x7f {
			return true
		}
	}
	return false
}

// compact rewrites the file with one line per user. The caller holds
// rolesLock; r has read the whole file. Frontends that have the old file open
// find it unlinked and read the new one.
func (r *roles) compact() error {
	const written = 1 << 31 // marks a user whose line is in the new file
	err := r.d.replaceFile(rolesName, func(w io.Writer) error {
		in := bufio.NewReader(io.NewSectionReader(r.file, 0, r.size))
		out := bufio.NewWriterSize(w, 1<<16)
		for {
			line, _, err := readLine(in)
			if errors.Is(err, io.EOF) {
				return out.Flush()
			}
			if err != nil {
				return err
			}
			user, _, err := parseLine(line)
			if err != nil {
				continue // damaged, see read
			}
			key := keyOf(user)
			if i := r.last[key]; i&written == 0 {
				r.last[key] = i | written
				fmt.Fprintf(out, "%s\t%s\n", user, r.names[i])
			}
		}
	})
	if err != nil {
		return err
	}
	return r.reopen()
}
