package config

import (
	"bytes"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"go.yaml.in/yaml/v3"
)

// FuzzParse feeds anything to the decoder and the validation. Whatever the
// decoder takes without a fault, yaml's own strict decoder must take as well,
// with the same result.
func FuzzParse(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.yml")
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(content)
	}
	f.Add([]byte(exampleFile))
	f.Add([]byte("auth: &a [*a]\n"))
	f.Add([]byte("admin: {socket_mode: \"0660\"}\nlisteners: [{mode: 0600}, {mode: 660}]\n"))
	f.Add([]byte("auth:\n  -\n"))
	f.Add([]byte("backends: {a: ~, 1: {done: !!binary eA==}, ~: {}}\nlimits: {auth_tries: 0x10}\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		cfg, err := load("f", "/nonexistent", content)
		if (cfg == nil) == (err == nil) {
			t.Fatalf("got %v and %v", cfg, err)
		}
		ours := Default()
		if d := parse("f", content, ours); len(d.errs) > 0 {
			for _, e := range d.errs {
				if e.Line < 1 || e.What == "" || e.Fix == "" || bytes.ContainsAny([]byte(e.Error()), "\n\x00") {
					t.Errorf("a poor message: %q", e.Error())
				}
			}
			return
		}
		theirs := Default()
		decoder := yaml.NewDecoder(bytes.NewReader(content))
		decoder.KnownFields(true)
		if err := decoder.Decode(theirs); err != nil && err.Error() != "EOF" {
			t.Fatalf("taken, but yaml says: %v", err)
		}
		// What yaml has no way to say: defaults within maps.
		defaults := defaultBackend()
		for name, b := range maps.Clone(theirs.Backends) {
			mine := ours.Backends[name]
			fill(&b.TLS.Mode, mine.TLS.Mode, defaults.TLS.Mode)
			fill(&b.Login.Style, mine.Login.Style, defaults.Login.Style)
			fill(&b.Done, mine.Done, defaults.Done)
			theirs.Backends[name] = b
		}
		if !reflect.DeepEqual(ours, theirs) {
			t.Fatalf("ours   %+v\ntheirs %+v", ours, theirs)
		}
	})
}

// fill sets an empty value to its default, where ours is it, too.
func fill(theirs *string, ours, fallback string) {
	if *theirs == "" && ours == fallback {
		*theirs = ours
	}
}

// TestAliasesAreBounded: a small file must not expand to a large configuration.
func TestAliasesAreBounded(t *testing.T) {
	content := "backends: {a: &a {imap: x}"
	for i := range maxAliases + 10 {
		content += ", a" + string(rune('a'+i%26)) + string(rune('a'+i/26%26)) + string(rune('a'+i/676)) + ": *a"
	}
	d := parse("f", []byte(content+"}"), Default())
	if len(d.errs) != 10 || d.errs[0].Fix != "write the values out" {
		t.Errorf("got %v", d.errs)
	}
}

// TestSocketClash says which addresses the kernel would refuse together.
func TestSocketClash(t *testing.T) {
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"127.0.0.1", "127.0.0.1", true},
		{"127.0.0.1", "127.0.0.2", false},
		{"", "127.0.0.1", true},
		{"", "::1", true},
		{"0.0.0.0", "127.0.0.1", true},
		{"0.0.0.0", "::1", false},
		{"0.0.0.0", "localhost", true},
		{"::", "0.0.0.0", true},
		{"Localhost", "localhost", true},
	} {
		a, b := socket{host: tt.a, port: 1}, socket{host: tt.b, port: 1}
		if a.clash(b) != tt.want || b.clash(a) != tt.want {
			t.Errorf("%q and %q: clash is not %t both ways", tt.a, tt.b, tt.want)
		}
		if b.port = 2; a.clash(b) {
			t.Errorf("%q and %q clash on different ports", tt.a, tt.b)
		}
	}
	if (socket{}).clash(socket{}) {
		t.Error("port 0 clashes")
	}
}
