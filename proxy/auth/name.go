package auth

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/secure/precis"
)

// Separators are the characters that mail servers give a meaning of their own
// within a login name (Dovecot's user*master and user%domain, Cyrus's
// user+detail, hierarchy and domain prefixes). With any of them two spellings
// can reach one mailbox under two keys, and so under two roles (safety case
// 29): they are refused unless Normalizer.Allow names them.
const Separators = "%*+!/\\"

// MaxName is the longest login name, in octets: RFC 4616 §2 obliges a server
// to accept 255, and no mailbox name of a real server is longer.
const MaxName = 255

// Normalizer gives a login name its canonical spelling, so that one user has
// one key. The zero value preserves case and allows no separator. It is safe
// for concurrent use.
//
// All frontends of a site must use the same one (safety case 30).
type Normalizer struct {
	// Lowercase maps the local part to lower case, too. The domain part, what
	// follows the @, always is.
	Lowercase bool
	// Allow lists those of Separators that are part of this site's names.
	Allow string
}

// NameError says why no user can have a name. It is an ErrCredentials.
type NameError struct{ Reason string }

// Error does not repeat the name: people type passwords into the wrong field.
func (e *NameError) Error() string { return "not a user name: " + e.Reason }

// Is makes a NameError an ErrCredentials.
func (e *NameError) Is(target error) bool { return target == ErrCredentials }

// Normalize returns the canonical spelling of name: the PRECIS profile
// UsernameCaseMapped or UsernameCasePreserved (RFC 8265 §3.3, §3.4), which
// also maps full-width forms, with the domain part in lower case. Applied to
// its own result it changes nothing. The error is a *NameError.
//
// Domains are not converted between their Unicode and xn-- forms: the
// directory has one of them.
func (n Normalizer) Normalize(name string) (string, error) {
	if err := n.check(name); err != nil {
		return "", err
	}
	// RFC 8265 §3.3.1 and RFC 8264 §7: some strings settle only after a
	// second or third application; what does not settle is refused.
	for range 4 {
		next, err := n.prepare(name)
		if err != nil {
			return "", err
		}
		if next == name {
			if err := n.check(name); err != nil {
				return "", err
			}
			return name, nil
		}
		name = next
	}
	return "", &NameError{"its Unicode form does not settle"}
}

// prepare applies the PRECIS profile once.
func (n Normalizer) prepare(name string) (string, error) {
	if n.Lowercase {
		return enforce(precis.UsernameCaseMapped, name)
	}
	local, domain, found := cutDomain(name)
	local, err := enforce(precis.UsernameCasePreserved, local)
	if err != nil || !found {
		return local, err
	}
	domain, err = enforce(precis.UsernameCaseMapped, domain)
	return local + "@" + domain, err
}

func enforce(profile *precis.Profile, s string) (string, error) {
	out, err := profile.String(s)
	if err != nil {
		return "", &NameError{"it holds a character, or a mixture of writing directions, that RFC 8265 forbids"}
	}
	return out, nil
}

// check refuses what no spelling can mend. It runs before PRECIS, which must
// not be fed garbage, and after it, because width mapping can produce ASCII.
func (n Normalizer) check(name string) error {
	switch {
	case name == "":
		return &NameError{"it is empty"}
	case len(name) > MaxName:
		return &NameError{fmt.Sprintf("it is longer than %d octets", MaxName)}
	case !utf8.ValidString(name):
		return &NameError{"it is not UTF-8"}
	}
	for _, r := range name {
		switch {
		case unicode.IsControl(r):
			return &NameError{"it holds a control character"}
		case unicode.IsSpace(r):
			return &NameError{"it holds white space"}
		case strings.ContainsRune("\"'`", r):
			return &NameError{"it holds a quote"}
		case r == ':':
			return &NameError{"it holds a colon, which ends the name in a passwd-file"}
		case strings.ContainsRune(Separators, r) && !strings.ContainsRune(n.Allow, r):
			return &NameError{fmt.Sprintf("it holds the separator %q, which usernames.allow does not list", r)}
		}
	}
	return checkDomain(name)
}

// checkDomain refuses spellings of a domain that name servers hold for equal
// to another one, and names with more than one @.
func checkDomain(name string) error {
	local, domain, found := cutDomain(name)
	switch {
	case !found:
		return nil
	case local == "" || domain == "":
		return &NameError{"nothing stands on one side of its @"}
	case strings.Contains(local, "@"):
		return &NameError{"it holds more than one @"}
	case strings.HasPrefix(domain, ".") || strings.HasSuffix(domain, ".") || strings.Contains(domain, ".."):
		return &NameError{"its domain has an empty label"}
	}
	return nil
}

// cutDomain cuts at the last @.
func cutDomain(name string) (local, domain string, found bool) {
	i := strings.LastIndexByte(name, '@')
	if i < 0 {
		return name, "", false
	}
	return name[:i], name[i+1:], true
}
