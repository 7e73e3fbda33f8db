package config

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
)

func (v *validation) hooks(path string, r Role) {
	if r.Scope != "" {
		v.oneOf(path+".scope", r.Scope, ScopeBackend, ScopeRole)
	}
	hooks := r.Hooks.ByName()
	for _, name := range slices.Sorted(maps.Keys(hooks)) {
		v.program(path+".hooks."+name, hooks[name][0])
	}
	for undo, do := range map[string]string{"undo_demote": "demote", "undo_promote": "promote"} {
		if len(hooks[undo]) > 0 && len(hooks[do]) == 0 {
			v.faultAt(path+".hooks."+undo, "there is no "+do+" hook", "add it, or remove this one")
		}
	}
	if len(hooks) == 0 && r.Scope != "" {
		v.faultAt(path+".scope", "has no effect without hooks", "remove it")
	}
}

// catchUp checks the comparison of a role, and fills its defaults in.
func (v *validation) catchUp(path string, r *Role) {
	c := &r.CatchUp
	if !v.written(path) {
		return
	}
	v.oneOf(path+".type", c.Type, CatchUpIMAP)
	if !v.written(path + ".parallel") {
		c.Parallel = 8
	}
	if !v.written(path + ".rate") {
		c.Rate = 200
	}
	if c.Parallel <= 0 {
		v.faultAt(path+".parallel", fmt.Sprintf("%d is not greater than zero", c.Parallel), "write a number such as 8")
	}
	if c.Rate < 0 {
		v.faultAt(path+".rate", fmt.Sprintf("%d is less than zero", c.Rate), "write a number such as 200, or 0 for no limit")
	}
	if len(c.Users) > 0 {
		v.program(path+".users", c.Users[0])
	}
	for _, member := range r.Members {
		b, ok := v.cfg.Backends[member]
		switch {
		case !ok: // is reported
		case b.Login.Style == StyleReplay:
			v.faultAt(path, fmt.Sprintf("%s has login style replay: nobody can look into its mailboxes without the users' passwords", member),
				"use style authzid or master-user there, or remove this")
		case b.IMAP == "" && b.Replica.IMAP == "":
			v.faultAt(path, member+" has no imap address", "add it, or replica.imap")
		}
	}
}

// program reports what cannot be run. Who runs it is the user of this process.
func (v *validation) program(path, name string) {
	if !filepath.IsAbs(name) {
		v.faultAt(path, quote(name)+" is not an absolute path", "name the program by its full path: it is run without a shell and without PATH")
		return
	}
	info, err := os.Stat(name)
	switch {
	case err != nil:
		v.faultAt(path, fmt.Sprintf("%s cannot be found: %s", name, reason(err)), "correct the path")
	case info.IsDir() || info.Mode().Perm()&0o111 == 0:
		v.faultAt(path, name+" is no program", "chmod +x, or name another file")
	}
}
