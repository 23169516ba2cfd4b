// What the tests of the runtime check with: the first failure ends the process, whatever its threads do.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline void expect(bool condition, const std::string& what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what.c_str());
  std::_Exit(1);
}

// `act` throws exactly the kind of error the caller relies on.
template <class Error, class Act>
void expect_throws(Act&& act, const std::string& what) {
  try {
    act();
  } catch (const Error&) {
    return;
  }
  expect(false, what + ": no error");
}
