package auth

import (
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/go-crypt/crypt/algorithm"
	"github.com/go-crypt/crypt/algorithm/bcrypt"
	"github.com/go-crypt/crypt/algorithm/shacrypt"
)

// go-crypt puts no bound on the cost that a hash asks for, and what looks up
// a password for minutes is an outage: the bounds below are checked when a
// file is loaded. At the upper ones a check takes about a second of one core.
const (
	minRounds = 1_000     // below, crypt(3) computes 1000 and go-crypt what is written
	maxRounds = 1_000_000 // of SHA512-CRYPT; mkpasswd's default is 5000
	minCost   = 4         // below, crypt(3) refuses and go-crypt computes 10
	maxCost   = 14        // of BLF-CRYPT, as power of two; doveadm's default is 5, PHP's 10 or 12
)

const (
	// maxBcrypt is what bcrypt looks at, in octets; it ignores the rest.
	maxBcrypt = 72
	// maxPassword bounds what is hashed, in octets: the work of SHA512-CRYPT
	// grows with it. libxcrypt's CRYPT_MAX_PASSPHRASE_SIZE.
	maxPassword = 512
)

// scheme is a way of storing a password.
type scheme int

const (
	schemeLocked scheme = iota // a hash that begins with ! or *: no password matches
	schemePlain
	schemeSHA512
	schemeBcrypt
)

// secret is one stored password. It holds no password in the clear and prints
// as its kind only.
type secret struct {
	kind   kind
	plain  [sha256.Size]byte // schemePlain: the password's digest
	digest algorithm.Digest  // schemeSHA512, schemeBcrypt
}

// kind is what determines the time that a check takes.
type kind struct {
	scheme scheme
	cost   int // rounds or bcrypt cost
}

func (s secret) Format(f fmt.State, _ rune) {
	fmt.Fprintf(f, "[redacted %d/%d]", s.kind.scheme, s.kind.cost)
}

// work is an estimate of the time of one check, to compare kinds.
func (k kind) work() int {
	switch k.scheme {
	case schemeSHA512:
		return k.cost
	case schemeBcrypt:
		return 64 << k.cost // 2^5 of bcrypt take about as long as 2000 rounds of SHA-512
	}
	return 0
}

// matches reports whether password is the one stored, in a time that depends
// on the kind and on the length of password alone. An empty one never is. Why
// says what the user should know about a password that cannot match, whatever
// is stored; it is empty otherwise. An error means that it could not tell.
func (s secret) matches(password string) (ok bool, why string, err error) {
	switch {
	case len(password) > maxPassword:
		why = fmt.Sprintf("password longer than %d octets", maxPassword)
		password = password[:maxPassword]
	case password == "":
		why = "empty password"
	}
	if s.kind.scheme == schemeBcrypt && len(password) > maxBcrypt {
		if why == "" {
			why = fmt.Sprintf("password longer than %d octets, which bcrypt would cut", maxBcrypt)
		}
		password = password[:maxBcrypt] // hash all the same: a quick answer would tell that the user exists
	}
	switch s.kind.scheme {
	case schemeLocked:
		why = "account is locked"
	case schemePlain:
		given := sha256.Sum256([]byte(password))
		ok = subtle.ConstantTimeCompare(given[:], s.plain[:]) == 1
	default:
		if ok, err = s.digest.MatchAdvanced(password); err != nil {
			return false, why, errors.New("the password hash could not be computed")
		}
	}
	return ok && why == "", why, nil
}

// entry is one line of a passwd-file.
type entry struct {
	user   string // normalised
	secret secret
}

// parseLine parses `user:{SCHEME}hash[:uid:gid:gecos:home:shell:extra]`. The
// error says what is wrong and what to do, without the hash. ok is false for
// a comment or an empty line.
func parseLine(line string, names Normalizer) (e entry, ok bool, err error) {
	line = strings.TrimSuffix(line, "\r")
	if strings.TrimSpace(line) == "" || strings.HasPrefix(line, "#") {
		return entry{}, false, nil
	}
	fields := strings.SplitN(line, ":", 8)
	if len(fields) < 2 {
		return entry{}, false, errors.New("has no colon; write user:{SCHEME}hash")
	}
	if e.user, err = names.Normalize(fields[0]); err != nil {
		return entry{}, false, fmt.Errorf("%w; correct it or list the separator in usernames.allow", err)
	}
	if e.secret, err = parseSecret(fields[1]); err != nil {
		return entry{}, false, err
	}
	if len(fields) == 8 {
		err = checkExtra(fields[7])
	}
	return e, err == nil, err
}

// restricting are Dovecot's extra fields that restrict or redirect a login.
// Ignoring one would let somebody in whom the file keeps out. userdb_ fields
// and all others concern Dovecot itself.
var restricting = []string{
	"allow_nets", "allow_real_nets", "authz", "delay_until", "domain", "fail", "login_user", "master_user",
	"noauthenticate", "nologin", "nopassword", "original_user", "pass_expired", "policy_reject", "temp", "user",
	"user_disabled", "username",
}

// checkExtra refuses extra fields that this package would have to obey.
func checkExtra(extra string) error {
	for field := range strings.FieldsSeq(extra) {
		key, _, _ := strings.Cut(field, "=")
		if slices.Contains(restricting, strings.ToLower(key)) {
			return fmt.Errorf("extra field %s is not supported, and to ignore it would let the wrong people in; remove it, or lock the account with ! before the hash", strings.ToLower(key))
		}
	}
	return nil
}

// parseSecret parses the second field. Without {SCHEME} it is CRYPT, as in
// Dovecot: the hash says what it is.
func parseSecret(field string) (secret, error) {
	name, hash, err := cutScheme(field)
	if err != nil {
		return secret{}, err
	}
	switch {
	case name == "PLAIN" && hash == "":
		return secret{}, errors.New("empty password; write one, or put ! there to lock the account")
	case name == "PLAIN":
		return secret{kind: kind{scheme: schemePlain}, plain: sha256.Sum256([]byte(hash))}, nil
	case hash == "":
		return secret{}, errors.New("no password; write {SCHEME}hash, or put ! there to lock the account")
	case strings.HasPrefix(hash, "!"), strings.HasPrefix(hash, "*"):
		return secret{kind: kind{scheme: schemeLocked}}, nil
	case name != "BLF-CRYPT" && strings.HasPrefix(hash, "$6$"):
		return parseSHA512(hash)
	case name != "SHA512-CRYPT" && strings.HasPrefix(hash, "$2"):
		return parseBcrypt(hash)
	case name == "CRYPT":
		return secret{}, errors.New("unknown kind of hash; use {PLAIN}, {SHA512-CRYPT} ($6$) or {BLF-CRYPT} ($2y$)")
	}
	return secret{}, fmt.Errorf("the hash is not of scheme %s; correct one of them", name)
}

// cutScheme splits {SCHEME}hash.
func cutScheme(field string) (name, hash string, err error) {
	if !strings.HasPrefix(field, "{") {
		return "CRYPT", field, nil
	}
	name, hash, closed := strings.Cut(field[1:], "}")
	if !closed {
		return "", "", errors.New("scheme without }; write {SCHEME}hash")
	}
	switch name = strings.ToUpper(name); name {
	case "PLAIN", "SHA512-CRYPT", "BLF-CRYPT", "CRYPT":
		return name, hash, nil
	case "CLEARTEXT":
		return "PLAIN", hash, nil
	}
	// Not the name: in `{secret}` without a scheme it would be the password.
	return "", "", errors.New("unknown scheme; use PLAIN, SHA512-CRYPT or BLF-CRYPT")
}

// The shapes of what crypt(3) writes. go-crypt is laxer: it takes a hash of any
// length (which then never matches) and an empty salt.
var (
	sha512Shape = regexp.MustCompile(`^\$6\$(?:rounds=([1-9][0-9]{0,9})\$)?[./0-9A-Za-z]{1,16}\$[./0-9A-Za-z]{86}$`)
	// $2x$ is left out: it marks hashes of a faulty crypt_blowfish, which
	// go-crypt would compute correctly, that is, differently. $2$ is older still.
	bcryptShape = regexp.MustCompile(`^\$2[aby]\$([0-9]{2})\$[./0-9A-Za-z]{53}$`)
)

func parseSHA512(hash string) (secret, error) {
	m := sha512Shape.FindStringSubmatch(hash)
	if m == nil {
		return secret{}, errors.New("broken SHA512-CRYPT hash; make it anew with `doveadm pw -s SHA512-CRYPT` or `mkpasswd -m sha512crypt`")
	}
	rounds := shacrypt.IterationsDefaultOmitted
	if m[1] != "" {
		rounds, _ = strconv.Atoi(m[1]) // at most ten digits
	}
	if rounds < minRounds || rounds > maxRounds {
		return secret{}, fmt.Errorf("SHA512-CRYPT with %d rounds; make it anew with %d to %d", rounds, minRounds, maxRounds)
	}
	digest, err := shacrypt.Decode(hash)
	if err != nil {
		return secret{}, errors.New("broken SHA512-CRYPT hash; make it anew")
	}
	return secret{kind: kind{schemeSHA512, rounds}, digest: digest}, nil
}

func parseBcrypt(hash string) (secret, error) {
	m := bcryptShape.FindStringSubmatch(hash)
	if m == nil {
		return secret{}, errors.New("broken or unsupported BLF-CRYPT hash; make it anew ($2y$) with `doveadm pw -s BLF-CRYPT` or `htpasswd -B`")
	}
	cost, _ := strconv.Atoi(m[1]) // two digits
	if cost < minCost || cost > maxCost {
		return secret{}, fmt.Errorf("BLF-CRYPT with cost %d; make it anew with %d to %d", cost, minCost, maxCost)
	}
	digest, err := bcrypt.Decode(hash)
	if err != nil {
		return secret{}, errors.New("broken BLF-CRYPT hash; make it anew")
	}
	return secret{kind: kind{schemeBcrypt, cost}, digest: digest}, nil
}
