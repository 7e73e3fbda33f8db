package config

import (
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

//go:embed example.yaml
var exampleFile string

// Example returns a complete configuration file with comments. Its certificate,
// password and map files are the reader's to provide.
func Example() string { return exampleFile }

// Load reads the file at path, fills in the defaults, makes paths absolute
// (relative ones start at the file's directory) and validates everything,
// including that the files it names can be used. The error is an Errors with
// every fault that was found; then there is no Config.
//
// The passwd-file and the map file are only opened: what is in them, package
// auth and package routing/directory judge.
func Load(path string) (*Config, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, Errors{{File: path, Line: 1, What: "cannot be read: " + reason(err), Fix: "name a configuration file that this user may read"}}
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, Errors{{File: path, Line: 1, What: "its directory is unknown: " + reason(err), Fix: "give an absolute path"}}
	}
	return load(path, dir, content)
}

// load is Load for content that has been read. dir is absolute.
func load(path, dir string, content []byte) (*Config, error) {
	cfg := Default()
	d := parse(path, content, cfg)
	if !d.broken[""] { // else there is nothing to validate
		v := &validation{document: d, cfg: cfg, dir: dir}
		v.run()
	}
	if len(d.errs) > 0 {
		return nil, d.errs.sorted()
	}
	return cfg, nil
}

// maxSecret is the longest secret, in octets; longer files are not secrets.
const maxSecret = 4096

// ReadSecret returns what a password file holds: one line, its line end
// removed. The file must not be accessible to others (o-rwx), must not be
// empty, and holds no NUL, CR or second line, which could not be sent. No error
// repeats the content.
func ReadSecret(path string) (string, error) {
	info, err := os.Stat(path)
	switch {
	case err != nil:
		return "", err
	case !info.Mode().IsRegular():
		return "", fmt.Errorf("%s is not a regular file", path)
	case info.Mode().Perm()&0o007 != 0:
		return "", fmt.Errorf("%s is open to everybody (mode %04o): chmod o-rwx it", path, info.Mode().Perm())
	case info.Size() > maxSecret:
		return "", fmt.Errorf("%s is longer than %d octets", path, maxSecret)
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	secret := strings.TrimSuffix(strings.TrimSuffix(string(content), "\n"), "\r")
	switch {
	case secret == "":
		return "", fmt.Errorf("%s is empty", path)
	case strings.ContainsAny(secret, "\x00\r\n"):
		return "", fmt.Errorf("%s holds more than one line, or a control character", path)
	}
	return secret, nil
}

// reason is why a file operation failed, without the path.
func reason(err error) string {
	var pathErr *fs.PathError
	if errors.As(err, &pathErr) {
		return pathErr.Err.Error()
	}
	return err.Error()
}
