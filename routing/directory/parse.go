package directory

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/posthouse/posthouse/routing"
)

// users is one reading of a file, never changed afterwards. 457 000 users take
// about 40 MB: names are parts of the file's text, roles are numbers.
type users struct {
	role  map[string]uint32 // canonical user → index into roles
	roles []string
	alias map[string]string // alias → canonical user
}

func (u *users) lookup(name string) (routing.Entry, error) {
	user, isAlias := u.alias[name]
	if !isAlias {
		user = name
	}
	i, ok := u.role[user]
	if !ok {
		return routing.Entry{}, routing.ErrUnknownUser
	}
	return routing.Entry{User: user, Role: u.roles[i]}, nil
}

const (
	// lineMax bounds a line: two names of SASL length would fit.
	lineMax = 4096
	// errorsMax bounds how many bad lines are reported at once.
	errorsMax = 100
)

// parser reads one file.
type parser struct {
	path, text string
	normalise  func(string) (string, error)
	users      *users
	number     map[string]uint32 // of a role
	pending    []pendingAlias
	problems   []problem // the first errorsMax
	bad        int       // all of them
}

// pendingAlias waits for the end of the file: its user may come later.
type pendingAlias struct {
	line        int
	alias, user string
}

// problem is a bad line. twice is the name that stands in another line too:
// which one is looked up once for all, since line numbers kept for each name
// would cost more than the names.
type problem struct {
	line  int
	err   error
	twice string
}

// parse reads text. path is for the errors only.
func parse(path, text string, normalise func(string) (string, error)) (*users, error) {
	lines := strings.Count(text, "\n") + 1
	p := &parser{
		path: path, text: text, normalise: normalise, number: map[string]uint32{},
		users: &users{role: make(map[string]uint32, lines), alias: map[string]string{}},
	}
	n := 0
	for line := range strings.Lines(text) {
		n++
		p.line(n, line)
	}
	for _, a := range p.pending {
		if _, ok := p.users.role[a.user]; !ok {
			p.fail(a.line, fmt.Errorf("alias %s leads to %s, which is no user of this file", a.alias, a.user))
		}
	}
	if p.bad > 0 {
		return nil, p.report()
	}
	return p.users, nil
}

func (p *parser) fail(line int, err error) { p.problem(problem{line: line, err: err}) }

func (p *parser) problem(bad problem) {
	p.bad++
	if len(p.problems) < errorsMax {
		p.problems = append(p.problems, bad)
	}
}

// report is all problems as one error, in the order of the lines.
func (p *parser) report() error {
	slices.SortStableFunc(p.problems, func(a, b problem) int { return cmp.Compare(a.line, b.line) })
	first := p.firstLines()
	var errs []error
	for _, bad := range p.problems {
		if bad.twice != "" {
			bad.err = fmt.Errorf("%s stands in line %d already", bad.twice, first[bad.twice])
		}
		errs = append(errs, fmt.Errorf("%s:%d: %w", p.path, bad.line, bad.err))
	}
	if more := p.bad - len(p.problems); more > 0 {
		errs = append(errs, fmt.Errorf("%s: and %d more", p.path, more))
	}
	return errors.Join(errs...)
}

// firstLines returns where the names that stand twice stand first.
func (p *parser) firstLines() map[string]int {
	lines := map[string]int{}
	for _, bad := range p.problems {
		if bad.twice != "" {
			lines[bad.twice] = 0
		}
	}
	n := 0
	for line := range strings.Lines(p.text) {
		n++
		left, _, _, err := split(line)
		if err != nil || len(lines) == 0 {
			continue
		}
		name, err := p.name(left)
		if was, wanted := lines[name]; err == nil && wanted && was == 0 {
			lines[name] = n
		}
	}
	return lines
}

var (
	errForm   = errors.New("want `user: role` or `alias -> user`")
	errLong   = fmt.Errorf("line is longer than %d bytes", lineMax)
	errSpaces = errors.New("blank, comma, control character or broken UTF-8 in a name")
)

func (p *parser) line(n int, line string) {
	left, right, isAlias, err := split(line)
	if err == nil && left == "" && right == "" {
		return
	}
	if err == nil {
		left, err = p.name(left)
	}
	if err == nil && isAlias {
		right, err = p.name(right)
	} else if err == nil {
		err = plausible(right)
	}
	switch {
	case err != nil:
		p.fail(n, err)
	case p.taken(left):
		p.problem(problem{line: n, twice: left})
	case isAlias:
		p.users.alias[left] = right
		p.pending = append(p.pending, pendingAlias{n, left, right})
	default:
		p.users.role[left] = p.role(right)
	}
}

// split returns the two sides of a line, both empty if there is nothing in it.
func split(line string) (left, right string, isAlias bool, err error) {
	line = strings.TrimRight(line, "\r\n")
	if len(line) > lineMax {
		return "", "", false, errLong
	}
	line = strings.TrimSpace(withoutComment(line))
	if line == "" {
		return "", "", false, nil
	}
	left, right, isAlias = strings.Cut(line, " -> ")
	if !isAlias {
		// The last colon: a name may have one, a role has none.
		i := strings.LastIndexByte(line, ':')
		if i < 0 {
			return "", "", false, errForm
		}
		left, right = line[:i], line[i+1:]
	}
	left, right = strings.TrimSpace(left), strings.TrimSpace(right)
	if left == "" || right == "" {
		return "", "", false, errForm
	}
	return left, right, isAlias, nil
}

// role returns the number of a role.
func (p *parser) role(name string) uint32 {
	i, ok := p.number[name]
	if !ok {
		i = uint32(len(p.users.roles))
		p.users.roles, p.number[name] = append(p.users.roles, name), i
	}
	return i
}

func (p *parser) taken(name string) bool {
	_, isUser := p.users.role[name]
	_, isAlias := p.users.alias[name]
	return isUser || isAlias
}

// withoutComment cuts from a # that begins the line or follows a blank. Inside
// a name it belongs to the name (RFC 5322 §3.2.3 allows it).
func withoutComment(line string) string {
	for i := 0; i < len(line); i++ {
		if line[i] == '#' && (i == 0 || line[i-1] == ' ' || line[i-1] == '\t') {
			return line[:i]
		}
	}
	return line
}

// name checks a name as written and makes it canonical.
func (p *parser) name(written string) (string, error) {
	if err := plausible(written); err != nil {
		return "", err
	}
	name, err := p.normalise(written)
	if err != nil {
		return "", fmt.Errorf("%q: %w", written, err)
	}
	if name == "" {
		return "", fmt.Errorf("%q becomes the empty name", written)
	}
	if name == written {
		return written, nil // a part of the text, no memory of its own
	}
	return name, nil
}

func plausible(name string) error {
	if !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool {
		return r == ',' || unicode.IsSpace(r) || unicode.IsControl(r)
	}) {
		return errSpaces
	}
	return nil
}
