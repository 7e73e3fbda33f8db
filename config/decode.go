package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"time"
	"unicode"

	"go.yaml.in/yaml/v3"
)

// FileMode is a file's permissions, written in octal with or without quotes
// and leading zero: 0660, "660".
type FileMode fs.FileMode

// String returns the permissions in octal, such as 0600.
func (m FileMode) String() string { return fmt.Sprintf("%04o", uint32(m)) }

// UnmarshalYAML reads octal, whatever YAML takes the digits for.
func (m *FileMode) UnmarshalYAML(n *yaml.Node) error {
	mode, err := strconv.ParseUint(n.Value, 8, 32)
	if err != nil || mode > 0o777 {
		return errors.New("not a file mode")
	}
	*m = FileMode(mode)
	return nil
}

// document is a YAML file being read into structs. It does by hand what
// yaml.Decoder does with KnownFields, because the decoder's messages name Go
// types instead of keys, and because it drops list items of the wrong type, so
// that indices no longer lead to lines. A test compares the two.
type document struct {
	file    string
	errs    Errors
	lines   map[string]int  // path of each key and list item → its line
	broken  map[string]bool // paths whose value could not be read: no later fault is reported there
	aliases int
}

// maxAliases bounds what a small file can expand to.
const maxAliases = 1000

// parse reads content into out, a pointer to a struct with its defaults set.
// What can be read is read, whatever else is wrong.
func parse(file string, content []byte, out any) *document {
	d := &document{file: file, lines: map[string]int{"": 1}, broken: make(map[string]bool)}
	decoder := yaml.NewDecoder(bytes.NewReader(content))
	var root yaml.Node
	switch err := decoder.Decode(&root); {
	case errors.Is(err, io.EOF):
		return d // an empty file: nothing but defaults
	case err != nil:
		d.syntaxError(err)
		return d
	}
	d.decode(root.Content[0], reflect.ValueOf(out).Elem(), "")
	var more yaml.Node
	if err := decoder.Decode(&more); err == nil {
		d.fault(more.Line, "a second YAML document", "keep everything in the first one, without ---")
	} else if !errors.Is(err, io.EOF) {
		d.syntaxError(err)
	}
	return d
}

var syntaxErrorShape = regexp.MustCompile(`^yaml: (?:line (\d+): )?(.*)`)

func (d *document) syntaxError(err error) {
	line, text := 1, err.Error()
	if m := syntaxErrorShape.FindStringSubmatch(text); m != nil {
		text = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			line = n
		}
	}
	d.broken[""] = true
	d.fault(line, "not YAML: "+text, "correct the syntax; the cause may stand one line earlier")
}

// fault records an error at a line.
func (d *document) fault(line int, what, fix string) {
	printable := func(r rune) rune { // a key may hold anything; a fault is one line
		if unicode.IsPrint(r) {
			return r
		}
		return unicode.ReplacementChar
	}
	d.errs = append(d.errs, Error{File: d.file, Line: max(line, 1), What: strings.Map(printable, what), Fix: fix})
}

// faultAt records an error of the value at path, unless that value could not
// even be read: then its fault has been reported.
func (d *document) faultAt(path, what, fix string) {
	for p := path; ; p = parent(p) {
		if d.broken[p] {
			return
		}
		if p == "" {
			break
		}
	}
	if path != "" {
		what = path + ": " + what
	}
	d.fault(d.line(path), what, fix)
}

// line is where path stands or, if it is absent, where its nearest ancestor does.
func (d *document) line(path string) int {
	for {
		if line, ok := d.lines[path]; ok {
			return line
		}
		path = parent(path)
	}
}

// written reports whether the file holds path.
func (d *document) written(path string) bool {
	_, ok := d.lines[path]
	return ok
}

// parent cuts the last key or index off a path such as listeners[0].address.
func parent(path string) string { return path[:max(strings.LastIndexAny(path, ".["), 0)] }

// join is the path of key within path.
func join(path, key string) string {
	if path == "" {
		return key
	}
	return path + "." + key
}

// mistake records that the value at path cannot be read.
func (d *document) mistake(n *yaml.Node, path, what, fix string) {
	d.broken[path] = true
	if path == "" {
		path = "the file"
	}
	d.fault(n.Line, path+": "+what, fix)
}

// isNull reports whether n says nothing at all.
func isNull(n *yaml.Node) bool {
	if n.Kind == yaml.AliasNode {
		n = n.Alias
	}
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null"
}

// decode reads n into v. A null leaves the default.
func (d *document) decode(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind == yaml.AliasNode {
		if d.aliases++; d.aliases > maxAliases {
			d.mistake(n, path, fmt.Sprintf("more than %d aliases", maxAliases), "write the values out")
			return
		}
		n = n.Alias
	}
	if isNull(n) {
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.decodeStruct(n, v, path)
	case reflect.Map:
		d.decodeMap(n, v, path)
	case reflect.Slice:
		d.decodeSlice(n, v, path)
	default:
		d.decodeScalar(n, v, path)
	}
}

func (d *document) decodeStruct(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		d.mistake(n, path, "must be a mapping", "write its keys: "+strings.Join(keysOf(v.Type()), ", "))
		return
	}
	d.eachKey(n, path, func(key, value *yaml.Node) {
		for i := range v.NumField() {
			if v.Type().Field(i).Tag.Get("yaml") == key.Value {
				d.decode(value, v.Field(i), join(path, key.Value))
				return
			}
		}
		where := ""
		if path != "" {
			where = " in " + path
		}
		d.fault(key.Line, fmt.Sprintf("unknown key %s%s", quote(key.Value), where), "known keys are "+strings.Join(keysOf(v.Type()), ", "))
	})
}

// keysOf lists the YAML keys of a struct type.
func keysOf(t reflect.Type) []string {
	keys := make([]string, t.NumField())
	for i := range keys {
		keys[i] = t.Field(i).Tag.Get("yaml")
	}
	return keys
}

func (d *document) decodeMap(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.MappingNode {
		d.mistake(n, path, "must be a mapping of names", "write `name: {…}` for each")
		return
	}
	v.Set(reflect.MakeMap(v.Type()))
	d.eachKey(n, path, func(key, value *yaml.Node) {
		element := reflect.New(v.Type().Elem()).Elem()
		if b, ok := element.Addr().Interface().(*Backend); ok {
			*b = defaultBackend()
		}
		d.decode(value, element, join(path, key.Value))
		v.SetMapIndex(reflect.ValueOf(key.Value), element)
	})
}

// eachKey calls do for each key of a mapping, and reports what is no plain key
// or stands there twice.
func (d *document) eachKey(n *yaml.Node, path string, do func(key, value *yaml.Node)) {
	seen := make(map[string]int)
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		switch before, twice := seen[key.Value]; {
		case key.ShortTag() == "!!merge":
			d.fault(key.Line, "merge keys (<<) are not supported", "use an alias for a whole value, such as tls: *tls")
		case key.Kind != yaml.ScalarNode, key.ShortTag() == "!!null":
			d.fault(key.Line, "a key must be a plain word", "write `key: value`")
		case twice:
			d.fault(key.Line, fmt.Sprintf("key %s stands in line %d already", quote(key.Value), before), "delete one of them")
		default:
			seen[key.Value] = key.Line
			d.lines[join(path, key.Value)] = key.Line
			do(key, value)
		}
	}
}

func (d *document) decodeSlice(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.SequenceNode {
		d.mistake(n, path, "must be a list", "write [one, two], or each item on a line that begins with -")
		return
	}
	v.Set(reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content)))
	for i, item := range n.Content {
		at := fmt.Sprintf("%s[%d]", path, i)
		d.lines[at] = item.Line
		if isNull(item) { // there is no default to leave
			d.mistake(item, at, "is empty", "write a value, or delete the item")
			continue
		}
		d.decode(item, v.Index(i), at)
	}
}

func (d *document) decodeScalar(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.ScalarNode {
		d.mistake(n, path, "must be a single value", "write "+example(v))
		return
	}
	ok := true
	switch out := v.Addr().Interface().(type) {
	case *string:
		if ok = n.ShortTag() != "!!binary"; ok {
			*out = n.Value
		}
	case *time.Duration:
		duration, err := time.ParseDuration(n.Value)
		if ok = err == nil && n.ShortTag() == "!!str"; ok {
			*out = duration
		}
	case *int:
		// YAML 1.1 reads 012 as 10: nobody who writes a limit means that.
		octal := len(n.Value) > 1 && n.Value[0] == '0'
		ok = !octal && n.ShortTag() == "!!int" && n.Decode(out) == nil
	default:
		ok = n.Decode(out) == nil
	}
	if !ok {
		d.mistake(n, path, quote(n.Value)+" is not "+kindOf(v), "write "+example(v))
	}
}

// kindOf says what v should be.
func kindOf(v reflect.Value) string {
	switch v.Addr().Interface().(type) {
	case *time.Duration:
		return "a duration"
	case *FileMode:
		return "a file mode"
	case *int:
		return "a whole number"
	case *bool:
		return "true or false"
	}
	return "a string"
}

// example says how to write v.
func example(v reflect.Value) string {
	switch v.Addr().Interface().(type) {
	case *time.Duration:
		return "a number with a unit, such as 30s or 15m"
	case *FileMode:
		return "octal permissions such as 0600"
	case *int:
		return "digits such as 10"
	case *bool:
		return "true or false"
	}
	return "one string"
}

// quote quotes a value for a message, and cuts a long one.
func quote(s string) string {
	if len(s) > 60 {
		s = strings.ToValidUTF8(s[:60], "") + "…"
	}
	return strconv.Quote(s)
}
